"""A model and its tokenizer fit, or are refused before a text meets an id without a row."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.evaluation.harness import BitNetLM
from bitnet_train.generate.loading import load
from tests.folders import edit_config, edit_tensor, write_master


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    loaded = load(str(tmp_path / "model"), "SRC")
    assert loaded.tokenizer.vocab_size == 293
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(tmp_path / "model", "model.embed_tokens.weight", embedding[:292].clone())
    edit_config(tmp_path / "model", vocab_size=292)
    for opened in (lambda source: load(source, "SRC"), BitNetLM.from_pretrained):
        with pytest.raises(UserError, match=r"every id of the tokenizer must be below .*vocab_size \(292\), got 292"):
            opened(str(tmp_path / "model"))
