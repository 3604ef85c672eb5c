"""A tokenizer that went into a GGUF file comes back as files that encode alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bitnet_train.errors import UserError
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.tokenizer_files import TokenizerFiles
from tests.folders import BOS, CHAT_TEMPLATE, EOS, EOT, TEXT, write_tokenizer

TEXTS = [TEXT, "def f(x):\n\treturn x  # é 你好 🙂\n\n", "  three   spaces\r\n", f"{BOS}a{EOT}", "", "1234567 it's"]


def metadata(folder: Path) -> dict[str, Any]:
    return TokenizerFiles(folder, {"vocab_size": 304}).gguf_metadata()


def test_the_files_encode_as_the_ones_that_were_exported(tmp_path: Path) -> None:
    original = write_tokenizer(tmp_path)
    (tmp_path / "back").mkdir()
    GGUFTokenizer(tmp_path, metadata(tmp_path)).write(tmp_path / "back")
    back = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in TEXTS:
        plain = back.encode(text, add_special_tokens=False)
        assert plain.ids == original.encode(text, add_special_tokens=False).ids
        assert back.decode(plain.ids, skip_special_tokens=False) == text
        assert back.encode(text).ids == [original.token_to_id(BOS), *plain.ids]
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["chat_template"]) == (BOS, EOS, CHAT_TEMPLATE)


def test_the_keys_survive_a_second_export(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    keys = metadata(tmp_path)
    stored = GGUFTokenizer(tmp_path, {"general.name": "m", **keys})
    assert stored.gguf_metadata() == keys
    (tmp_path / "back").mkdir()
    stored.write(tmp_path / "back")
    assert metadata(tmp_path / "back") == keys


def test_ids_of_generation(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, EOT)]
    stored = GGUFTokenizer(tmp_path, metadata(tmp_path))
    expected = {"bos_token_id": ids[0], "eos_token_id": ids[1:], "pad_token_id": ids[1]}
    assert stored.generation_ids() == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "tekken", "tokenizer.ggml.pre must be one of llama-bpe, smaug-bpe, qwen2, gpt-2, smollm, got 'tekken'"),
        ("pre", None, "key tokenizer.ggml.pre must be there"),
        ("merges", None, "key tokenizer.ggml.merges must be there"),
        ("model", "llama", r"tokenizer.ggml.model must be gpt2 \(a byte-level BPE\), got 'llama'; give --tokenizer"),
        ("token_type", [6] + [1] * 303, "tokenizer.ggml.token_type must be one of 1, 3, 4, 5 .*, got 6"),
    ],
)
def test_what_was_not_written_here_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    write_tokenizer(tmp_path)
    keys = {**metadata(tmp_path), f"tokenizer.ggml.{key}": value}
    with pytest.raises(UserError, match=message):
        _ = GGUFTokenizer(tmp_path, {key: value for key, value in keys.items() if value is not None}).tokenizer_json


def test_gpt_2_splits_by_byte_level_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    stored = GGUFTokenizer(tmp_path, {**metadata(tmp_path), "tokenizer.ggml.pre": "gpt-2"}).tokenizer_json
    assert stored["pre_tokenizer"]["use_regex"]
    assert not stored["model"]["ignore_merges"]


def test_a_tokenizer_without_bos_comes_back_without(tmp_path: Path) -> None:
    """Though LLaMA-3's name of it is a token."""
    (tmp_path / "source").mkdir()
    write_tokenizer(tmp_path / "source")
    file = tmp_path / "source" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
    metadata = TokenizerFiles(tmp_path / "source", {"vocab_size": 304}).gguf_metadata()
    assert GGUFTokenizer(tmp_path, metadata).tokenizer_config["bos_token"] is None
