"""What GGUF and generation_config.json are told about a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bitnet_train.data.tokenizer import LLAMA3_SPLIT
from bitnet_train.errors import UserError
from bitnet_train.formats.tokenizer_files import TokenizerFiles
from tests.folders import BOS, CHAT_TEMPLATE, EOS, EOT, LLAMA_3_SPLIT, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return write_tokenizer(tmp_path)


def edit(folder: Path, file: str, **fields: object) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(content | fields))


def added_token(id_: int, content: str, **flags: bool) -> dict[str, object]:
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {"id": id_, "content": content, **usual, **flags}


def byte_level(**how: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **how}


def metadata(folder: Path, **config: object) -> dict[str, Any]:
    return TokenizerFiles(folder, {"vocab_size": 304, **config}).gguf_metadata()


def test_the_split_rule_is_that_of_trained_tokenizers() -> None:
    assert LLAMA3_SPLIT == LLAMA_3_SPLIT


def test_tokens_types_and_merges(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = metadata(tmp_path)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:293] == [tokenizer.id_to_token(id_) for id_ in range(293)]
    assert tokens[293:] == [f"[PAD{id_}]" for id_ in range(293, 304)]
    assert found["tokenizer.ggml.token_type"] == [1] * 290 + [3] * 3 + [5] * 11
    left, right = found["tokenizer.ggml.merges"][0].split(" ")
    assert tokenizer.token_to_id(left + right) == 256  # the first token after the bytes
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "llama-bpe"


def test_special_ids_and_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = metadata(tmp_path)
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.token_to_id(BOS)
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id(EOS)
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.token_to_id(EOT)
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.token_to_id(EOS)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_bos_is_added_where_the_template_writes_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A runtime that adds BOS puts it in front of a conversation, too."""
    added = "tokenizer.ggml.add_bos_token"
    edit(tmp_path, "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert metadata(tmp_path)[added] is False
    edit(tmp_path, "tokenizer_config.json", chat_template="{# no bos_token #}{{ messages[0].content }}")
    assert metadata(tmp_path)[added] is False
    edit(tmp_path, "tokenizer_config.json", chat_template=None)
    assert metadata(tmp_path)[added] is True
    edit(tmp_path, "tokenizer_config.json", add_bos_token=False)
    assert metadata(tmp_path)[added] is False


def test_a_tokenizer_without_bos_has_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Qwen2's: null, though LLaMA-3's name is a token here."""
    edit(tmp_path, "tokenizer_config.json", bos_token=None)
    found = metadata(tmp_path)
    assert "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_what_generation_config_stops_at_travels_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eos, eot = (tokenizer.token_to_id(token) for token in (EOS, EOT))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 7]}))
    assert TokenizerFiles(tmp_path, {"vocab_size": 304}).stop_ids == [eos, 7, eot]


def test_merges_may_be_strings_and_added_tokens_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    added = [added_token(290, "word", special=False)]  # the first free id: the library gives no other
    merges = [" ".join(merge) for merge in model["merges"]]
    expected = metadata(tmp_path)["tokenizer.ggml.merges"]
    edit(tmp_path, "tokenizer.json", model={**model, "merges": merges}, added_tokens=added)
    found = metadata(tmp_path)
    assert found["tokenizer.ggml.merges"] == expected == merges
    assert found["tokenizer.ggml.token_type"][290] == 4
    assert found["tokenizer.ggml.tokens"][290] == "word"


def test_the_config_of_the_model_comes_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = {"vocab_size": 304, "bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 9}
    files = TokenizerFiles(tmp_path, config)
    eot = tokenizer.token_to_id(EOT)
    assert files.generation_ids() == {"bos_token_id": 5, "eos_token_id": [7, 8, eot], "pad_token_id": 9}
    assert metadata(tmp_path, **config)["tokenizer.ggml.padding_token_id"] == 9


def test_without_configs_the_names_of_llama_3_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer_config.json").unlink()
    files = TokenizerFiles(tmp_path, {"vocab_size": 304})
    ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, EOT)]
    assert files.generation_ids() == {"bos_token_id": ids[0], "eos_token_id": ids[1:]}
    assert files.chat_template is None
    assert "tokenizer.chat_template" not in files.gguf_metadata()


def test_a_folder_without_a_tokenizer_has_no_ids(tmp_path: Path) -> None:
    assert TokenizerFiles(tmp_path, {"vocab_size": 304}).generation_ids() == {}
    with pytest.raises(UserError, match=r"tokenizer\.json: must be there for GGUF, found none; give --tokenizer"):
        metadata(tmp_path)


def test_the_chat_template_may_be_a_file_or_one_of_several(tmp_path: Path, tokenizer: Tokenizer) -> None:
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(tmp_path, "tokenizer_config.json", chat_template=several)
    assert TokenizerFiles(tmp_path, {}).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert TokenizerFiles(tmp_path, {}).chat_template == "file"


def test_gpt_2_is_the_expression_of_byte_level_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    edit(tmp_path, "tokenizer.json", pre_tokenizer=byte_level())
    assert metadata(tmp_path)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer must be one that GGUF has a name for"),
        ({"pre_tokenizer": None}, "pre_tokenizer must be"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer must be null for GGUF, which keeps none"),
        ({"pre_tokenizer": byte_level(add_prefix_space=True)}, "pre_tokenizer must be"),
        ({"pre_tokenizer": byte_level(use_regex=False)}, "pre_tokenizer must be"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, byte_level()],
                }
            },
            "pre_tokenizer must be",
        ),
        (
            {"model": {"type": "Unigram", "vocab": []}},
            r"model\.type must be BPE for GGUF, got 'Unigram'; use --format safetensors",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, r"model\.merges must not be empty"),
        (
            {"added_tokens": [added_token(290 + n, f"x{n}") for n in range(15)]},
            r"every id must be below the model's vocab_size \(304\), got 304",
        ),
        ({"added_tokens": [added_token(290, "x", lstrip=True)]}, r"added token 'x': lstrip must be false for GGUF"),
        ({"added_tokens": [added_token(290, "x", rstrip=True)]}, r"added token 'x': rstrip must be false for GGUF"),
        (
            {"added_tokens": [added_token(290, "x", single_word=True)]},
            r"added token 'x': single_word must be false for GGUF",
        ),
        ({"added_tokens": [added_token(290, "[PAD300]")]}, r"every token must be there once .* got '\[PAD300\]'"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, object], message: str
) -> None:
    edit(tmp_path, "tokenizer.json", **changes)
    with pytest.raises(UserError, match=r"tokenizer\.json: " + message):
        metadata(tmp_path)


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"bos_token_id must be an id below vocab_size \(304\), got 128000"):
        metadata(tmp_path, bos_token_id=128000)


def test_tags_that_runtimes_lack_become_others_of_the_same_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = "{{ a }}{% generation %}x {%- endgeneration -%} y{{ 'generation' }}"
    edit(tmp_path, "tokenizer_config.json", chat_template=template)
    stored = metadata(tmp_path)["tokenizer.chat_template"]
    assert stored == "{{ a }}{% if true %}x {%- endif -%} y{{ 'generation' }}"
    assert TokenizerFiles(tmp_path, {}).chat_template == template
