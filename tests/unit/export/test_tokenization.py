"""A GGUF file says the tokenizer that was trained with, or is not written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bitnet_train.data.template import BITNET_CHAT_TEMPLATE
from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.awkward import awkward_texts, conversations
from bitnet_train.export.source import open_source
from bitnet_train.formats.gguf_file import GGUFFile
from tests.folders import BOS, EOS, EOT, LLAMA_3_SPLIT, TEXT, edit_config, write_master

QWEN_2_SPLIT = LLAMA_3_SPLIT.replace("{1,3}", "")
WORDS = [TEXT, "12 + 3 = 15, I'm naïve: 日本 and café cafe\u0301", "aaaa bbbb <|x|> def f(x):\n    return x"]


def steps(*cuts: str | pre_tokenizers.PreTokenizer, expression: bool = False) -> pre_tokenizers.PreTokenizer:
    made = [cut if isinstance(cut, pre_tokenizers.PreTokenizer) else _split(cut) for cut in cuts]
    return pre_tokenizers.Sequence([*made, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression)])


def _split(cut: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(cut), behavior=behavior, invert=invert)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
SAYABLE = {
    "gpt-2": steps(expression=True),
    "smollm": steps(DIGITS, expression=True),
    "llama-bpe": steps(LLAMA_3_SPLIT),
    "qwen2": steps(QWEN_2_SPLIT),
}
UNSAYABLE = {
    "digits behind LLaMA-3's": steps(LLAMA_3_SPLIT, DIGITS),
    "digits in groups": steps(pre_tokenizers.Digits(individual_digits=False), expression=True),
    "punctuation first": steps(pre_tokenizers.Punctuation("isolated"), expression=True),
    "merged with the next": steps(_split(LLAMA_3_SPLIT, "merged_with_next")),
    "a text first": steps(pre_tokenizers.Split(" and ", "isolated"), expression=True),
    "two expressions": steps(LLAMA_3_SPLIT, QWEN_2_SPLIT),
}
NORMALIZERS = [
    *(normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()),
    *(normalizers.Replace("\t", "    "), normalizers.Sequence([normalizers.NFD()])),
]


def write_model(folder: Path, pre: pre_tokenizers.PreTokenizer, first: Sequence[str] = (), **changes: Any) -> Tokenizer:
    """A folder of masters with a trained byte-level BPE; `first` are special tokens with the lowest ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=[*first], show_progress=False
    )
    backend.train_from_iterator(WORDS * 4, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS, EOT)])
    for name, value in changes.items():
        setattr(backend, name, value)
    write_master(folder, {"vocab_size": 384}, with_tokenizer=False)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return backend


def edit_model(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], **fields}}))


def test_there_are_200_texts_and_they_differ() -> None:
    texts = awkward_texts(["<|a|>", "<|b|>"])
    assert len(texts) == len(set(texts)) == 200
    assert len(awkward_texts([])) == 200
    assert any(not text.isprintable() for text in texts)
    assert sum("<|a|>" in text for text in texts) == 10
    assert len([*conversations()]) == 36


@pytest.mark.parametrize("name", SAYABLE)
@pytest.mark.parametrize("first", [(), (BOS, EOS, EOT)], ids=["special last", "special first"])
def test_a_tokenizer_goes_to_gguf_and_back(tmp_path: Path, name: str, first: Sequence[str]) -> None:
    backend = write_model(tmp_path / "model", SAYABLE[name], first)
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    assert GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == name
    export(tmp_path / "m.gguf", tmp_path / "back")
    back = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in awkward_texts([BOS, EOS, EOT]):
        for plain in (False, True):
            backend.encode_special_tokens = back.encode_special_tokens = plain
            ids = backend.encode(text, add_special_tokens=False).ids
            assert back.encode(text, add_special_tokens=False).ids == ids
            assert back.decode(ids, skip_special_tokens=False) == text
    names = (BOS, EOS, EOT)
    assert [back.token_to_id(name) for name in names] == [backend.token_to_id(name) for name in names]


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=rf"tokenizer\.json: {message}.*use --format safetensors"):
        export(folder, folder.parent / "m.gguf", format="gguf")
    assert not (folder.parent / "m.gguf").exists()
    export(folder, folder.parent / "packed")


@pytest.mark.parametrize("what", UNSAYABLE)
def test_cuts_without_a_name_are_refused(tmp_path: Path, what: str) -> None:
    write_model(tmp_path / "model", UNSAYABLE[what])
    refused(tmp_path / "model", "pre_tokenizer must be one that GGUF has a name for")


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda normalizer: type(normalizer).__name__)
def test_normalizers_are_refused(tmp_path: Path, normalizer: object) -> None:
    write_model(tmp_path / "model", SAYABLE["gpt-2"], normalizer=normalizer)
    refused(tmp_path / "model", "normalizer must be null for GGUF")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_around_are_refused(tmp_path: Path, flag: str) -> None:
    backend = write_model(tmp_path / "model", SAYABLE["gpt-2"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False, **{flag: True})])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    refused(tmp_path / "model", f"added token '<think>': {flag} must be false for GGUF")


def test_added_tokens_without_a_role_are_the_same_everywhere(tmp_path: Path) -> None:
    backend = write_model(tmp_path / "model", SAYABLE["llama-bpe"])
    backend.add_tokens(
        [AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", normalized=True)]
    )
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    back = open_source(tmp_path / "m.gguf").trained_tokenizer
    for text in ("<think>a</think>", " <think> 1 </think>\n"):
        assert back.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_ids_are_the_librarys_where_the_file_has_others(tmp_path: Path) -> None:
    """Added tokens get the next free ids, whatever tokenizer.json says of them."""
    backend = write_model(tmp_path / "model", SAYABLE["llama-bpe"])
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["id"] += 20
    path.write_text(json.dumps(content))
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    assert GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.bos_token_id"] == backend.token_to_id(BOS)


def test_ignore_merges_is_said_by_the_name_or_makes_no_difference(tmp_path: Path) -> None:
    """smaug-bpe has LLaMA-3's cuts without it; a word that merging alone would not make tells them apart."""
    write_model(tmp_path / "model", SAYABLE["llama-bpe"])
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    merges = [merge for merge in content["model"]["merges"] if merge != ["ma", "ll"]]
    assert len(merges) < len(content["model"]["merges"])
    for ignores, name in ((False, "smaug-bpe"), (True, "llama-bpe")):
        edit_model(tmp_path / "model", merges=merges, ignore_merges=ignores)
        export(tmp_path / "model", tmp_path / name, format="gguf")
        assert GGUFFile(tmp_path / name).metadata["tokenizer.ggml.pre"] == name
    ids = [open_source(tmp_path / name).trained_tokenizer.encode(" small") for name in ("smaug-bpe", "llama-bpe")]
    assert ids[0] != ids[1]


def test_ignore_merges_without_a_name_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SAYABLE["gpt-2"])
    edit_model(tmp_path / "model", ignore_merges=True)
    export(tmp_path / "model", tmp_path / "closed.gguf", format="gguf")  # merging makes every token
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    edit_model(tmp_path / "model", merges=[merge for merge in merges if merge != ["ma", "ll"]])
    refused(tmp_path / "model", "model.ignore_merges must be False for GGUF")


def test_a_word_that_runtimes_take_for_a_control_token_is_refused(tmp_path: Path) -> None:
    """Qwen2's vocabulary has `</s>` as a word; llama.cpp goes by its name."""
    write_model(tmp_path / "model", SAYABLE["qwen2"])
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for number, (left, right) in enumerate([("<", "/"), ("</", "s"), ("</s", ">")], 340):
        vocabulary[left + right] = number
        merges.append([left, right])
    edit_model(tmp_path / "model", vocab=vocabulary, merges=merges)
    refused(
        tmp_path / "model", r"the tokenizer must be one that the keys of GGUF can say, got other ids for \d+ of 200"
    )


def test_an_unknown_token_beside_bytes_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SAYABLE["gpt-2"])
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = {token: id_ for token, id_ in content["model"]["vocab"].items() if token != "\u0142"}
    edit_model(tmp_path / "model", vocab=vocabulary, unk_token=EOS)
    refused(tmp_path / "model", "every byte must be a token for GGUF")


def test_an_older_template_of_bitnet_is_written_as_the_tokenizer_has_it(tmp_path: Path) -> None:
    """Runs of old saved it without BOS, which training put in front all the same."""
    write_model(tmp_path / "model", SAYABLE["llama-bpe"])
    older = BITNET_CHAT_TEMPLATE.removeprefix("{# BITNET #}{{ bos_token }}")
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": older}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "tokenizer_config.json").read_text())
    assert written == config | {"chat_template": BITNET_CHAT_TEMPLATE}
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert "bos_token" in str(metadata["tokenizer.chat_template"])


def test_the_tokenizer_must_fit_the_embedding(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SAYABLE["gpt-2"])
    edit_config(tmp_path / "model", vocab_size=300)
    with pytest.raises(UserError, match=r"embed_tokens\.weight must have shape"):
        export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")


def test_a_name_by_which_runtimes_cut_spaces_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "bitnet-Phi-3", SAYABLE["gpt-2"])
    with pytest.raises(UserError, match=r"the name must not hold phi-3 or phi3 for GGUF, .* give another --name"):
        export(tmp_path / "bitnet-Phi-3", tmp_path / "m.gguf", format="gguf")
    export(tmp_path / "bitnet-Phi-3", tmp_path / "m.gguf", format="gguf", name="bitnet")
