"""The tokenizer: exact round trips, text that stays text, and files that transformers reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bitnet_train.data.template import BITNET_CHAT_TEMPLATE
from bitnet_train.data.tokenizer import BOS, EOS, EOT, LLAMA3_SPLIT, Tokenizer, train_bpe
from bitnet_train.errors import UserError

TEXTS = [f"It's the year {year}: we'll count 12345 words,\n\n  and   lines.\r\n" for year in range(1990, 2020)]


TOKENIZER = train_bpe(TEXTS, 384)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return TOKENIZER


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def names_of_special_tokens(folder: Path) -> list[str]:
    return [token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text]) == [TOKENIZER.encode(text)]


def test_merges_are_learned(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([id]) for id in tokenizer.encode("count the words")][-2:] == [" the", " words"]


def test_the_split_is_llama3s() -> None:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("It's 12345 (x+y)!!\n\n  end  ")]
    assert pieces == ["It", "'s", " ", "123", "45", " (", "x", "+y", ")!!\n\n", " ", " end", "  "]


@pytest.mark.parametrize("vocab_size", [259, 300, 384, 1024])
def test_the_vocabulary_has_the_size_asked_for_and_its_special_tokens_last(vocab_size: int, tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, vocab_size)
    tokenizer.save(tmp_path)
    special = names_of_special_tokens(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert special[:3] == [BOS, EOS, EOT]
    assert tokenizer.bos_token_id == vocab_size - len(special)
    assert (tokenizer.eos_token_id, tokenizer.eot_token_id) == (tokenizer.bos_token_id + 1, tokenizer.bos_token_id + 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.stop_token_ids == (tokenizer.eos_token_id, tokenizer.eot_token_id)


def test_a_vocabulary_without_room_for_the_bytes_is_an_error() -> None:
    with pytest.raises(UserError, match="vocab_size must be at least 259, got 258"):
        train_bpe(TEXTS, 258)


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer) -> None:
    code = f"from bitnet_train.data.tokenizer import train_bpe; print(train_bpe({TEXTS!r}, 384).fingerprint)"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "3"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer.fingerprint


def test_names_of_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    text = f"a{EOT}b{BOS}{EOS}"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_token_id, *tokenizer.stop_token_ids} & set(ids)
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == text


def test_pieces_have_special_tokens_but_for_quoted_ones(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode_pieces([f"a{EOT}", f"b{EOT}"]) == [
        [*a, tokenizer.eot_token_id],
        [*b, tokenizer.eot_token_id],
    ]
    quoted = tokenizer.quote(f"a{EOT}b") + EOT
    assert tokenizer.encode_pieces([quoted]) == [[*a, *tokenizer.encode(EOT), *b, tokenizer.eot_token_id]]


def test_a_quote_cannot_be_undone_from_within(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.quote(EOT)[0], tokenizer.quote(EOT)[-1]
    for mark in (start, end, end + start):
        for text in (EOT[0] + mark + EOT[1:], mark + EOT, EOT + mark, EOT[:5] + mark + EOT[5:]):
            assert tokenizer.eot_token_id not in tokenizer.encode_pieces([tokenizer.quote(text)])[0]


def test_a_quote_holds_though_a_template_cuts_a_mark_away(tokenizer: Tokenizer) -> None:
    quoted = tokenizer.quote(EOT)
    for torn in (quoted[1:], quoted[:-1]):
        assert tokenizer.encode_pieces([torn]) == [tokenizer.encode(EOT)]


def test_decode_can_skip_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.begun(tokenizer.encode("hi")), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == f"{BOS}hi{EOS}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_save_and_load(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.from_folder(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.chat_template == BITNET_CHAT_TEMPLATE
    loaded.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_that_was_saved_before_the_template_wrote_bos_has_its_old_fingerprint(folder: Path) -> None:
    """A run goes on that was begun with it; that its conversations begin with BOS is as it was."""
    old = BITNET_CHAT_TEMPLATE.removeprefix("{# BITNET #}{{ bos_token }}")
    edit_config(folder, chat_template=old)
    loaded = Tokenizer.from_folder(folder)
    assert loaded.chat_template == BITNET_CHAT_TEMPLATE
    before = loaded.fingerprint
    edit_config(folder, chat_template=BITNET_CHAT_TEMPLATE)
    assert Tokenizer.from_folder(folder).fingerprint != before


def test_transformers_reads_the_same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "".join(TEXTS[:3]) + " größer 日本 🙂"
    assert theirs(text).input_ids == [
        tokenizer.bos_token_id,
        *tokenizer.encode(text),
    ]  # one BOS, as LLaMA-3's file adds
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert theirs.chat_template == tokenizer.chat_template
    assert len(theirs) == tokenizer.vocab_size


def test_a_post_processor_truncation_and_padding_add_nothing(tokenizer: Tokenizer, folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    loaded = Tokenizer.from_folder(folder)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_the_config_may_be_missing_or_name_tokens_as_objects(tokenizer: Tokenizer, folder: Path) -> None:
    edit_config(folder, pad_token={"__type": "AddedToken", "content": EOT}, model_max_length=4096, auto_map={"x": "y"})
    loaded = Tokenizer.from_folder(folder)
    assert loaded.pad_token_id == tokenizer.eot_token_id
    assert loaded.fingerprint != tokenizer.fingerprint
    loaded.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 4096
    assert "auto_map" not in config
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).fingerprint == tokenizer.fingerprint


def test_where_a_chat_template_comes_from(tokenizer: Tokenizer, folder: Path) -> None:
    edit_config(folder, chat_template=[{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}])
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(folder).chat_template == "J"
    assert Tokenizer.from_folder(folder).fingerprint != tokenizer.fingerprint


PANIC = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": None},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", PANIC, "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: must be JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "bos_token '<s>' is no token of tokenizer.json"),
    ],
)
def test_bad_folders(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(folder)


def test_forks_neither_warn_nor_hang() -> None:
    code = """
import multiprocessing
from bitnet_train.data.tokenizer import train_bpe
tokenizer = train_bpe(["some text"] * 100, 300)
tokenizer.encode_batch(["some text"] * 100)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(len(pool.map(tokenizer.encode_batch, [["some text"] * 100] * 4)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert (result.stdout, result.stderr) == ("4\n", "")


@given(st.text("ab é日🎉\n", max_size=40), st.integers(0, 3))
def test_a_stream_of_ids_gives_whole_characters_and_in_the_end_the_text(text: str, cut: int) -> None:
    """Also where it ends within a character, and for ids that are bytes of none."""
    ids = TOKENIZER.encode(text + " 日本 🎉🎉 ß")
    ids = ids[: len(ids) - cut]
    pieces = list(TOKENIZER.decode_stream(iter(ids)))
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert len(pieces) > 5
