"""Models that are refused, with the reason, and nothing left behind."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export
from tests.folders import edit_config, edit_tensor, write_master

MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("fields", "format", "message"),
    [
        ({"hidden_act": "silu"}, "gguf", "hidden_act must be relu2 for GGUF.*got silu"),
        ({"attention_bias": True}, "gguf", "attention_bias must be false for gguf"),
        ({"attention_bias": True}, "safetensors", "attention_bias must be false for safetensors"),
        ({"hidden_size": 64}, "gguf", "multiple of 128 for I2_S, got 64"),
        ({"intermediate_size": 254}, "safetensors", "multiple of 4 to be packed, got 254"),
        ({"vocab_size": 200}, "gguf", r"every id must be below the model's vocab_size \(200\), got 292"),
    ],
)
def test_models_that_a_format_cannot_hold(
    tmp_path: Path, fields: dict[str, int | str], format: str, message: str
) -> None:
    write_master(tmp_path / "master", fields)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "master", tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == ["master"]


def test_silu_and_biases_are_kept_where_they_can_be(tmp_path: Path) -> None:
    write_master(tmp_path / "silu", {"hidden_act": "silu"})
    write_master(tmp_path / "bias", {"attention_bias": True})
    export(tmp_path / "silu", tmp_path / "packed")
    export(tmp_path / "bias", tmp_path / "copy", format="master")
    assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "copy" / "model.safetensors")


@pytest.mark.parametrize("format", ["safetensors", "master"])
def test_a_packed_folder_is_refused_where_masters_are_needed(master: Path, tmp_path: Path, format: str) -> None:
    export(master, tmp_path / "packed")
    with pytest.raises(UserError, match="is packed"):
        export(tmp_path / "packed", tmp_path / "out", format=format)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": None}, "quantization_config must be there, got none"),
        ({"model_type": "llama", "quantization_config": None}, "model_type must be 'bitnet', got 'llama'"),
        ({"hidden_size": 256}, r"shape must be \(\d+, 256\).*got \(\d+, 128\)"),
        ({"hidden_size": "128"}, "a field has the wrong type"),
        ({"num_hidden_layers": 3}, "got 11 missing, such as model.layers.2"),
        ({"num_hidden_layers": 1}, "got 11 unknown, such as model.layers.1"),
        ({"bos_token_id": 128000}, r"bos_token_id must be below vocab_size \(304\), got 128000"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    master: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    edit_config(master, **fields)
    with pytest.raises(UserError, match=message):
        export(master, tmp_path / "out")
    assert os.listdir(tmp_path) == ["master"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, f"got 1 missing, such as {MATRIX}"),
        (torch.zeros(128, 128), rf"{MATRIX}: shape must be \(128, 256\) by config.json, got \(128, 128\)"),
        (torch.full((128, 256), torch.inf), f"{MATRIX}: every value must be finite, got 32768"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    master: Path, tmp_path: Path, tensor: torch.Tensor | None, message: str
) -> None:
    edit_tensor(master, MATRIX, tensor)
    with pytest.raises(UserError, match=message):
        export(master, tmp_path / "out")
    assert os.listdir(tmp_path) == ["master"]


def test_a_value_beyond_float16_is_refused(master: Path, tmp_path: Path) -> None:
    edit_tensor(master, "model.embed_tokens.weight", torch.full((304, 128), 1e5))
    with pytest.raises(UserError, match=r"embed_tokens\.weight: every value must be within the range of F16, got"):
        export(master, tmp_path / "model.gguf", format="gguf")
    assert os.listdir(tmp_path) == ["master"]


def test_gguf_needs_a_tokenizer(master: Path, tmp_path: Path) -> None:
    (master / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read: No such file"):
        export(master, tmp_path / "model.gguf", format="gguf")
    export(master, tmp_path / "packed")
    assert not (tmp_path / "packed" / "tokenizer.json").exists()
