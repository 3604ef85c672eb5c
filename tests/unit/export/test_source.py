"""What is a source, and models that are refused, with the reason, and nothing left behind."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export, verify
from bitnet_train.export.source import open_source
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.hf_folder import folder_kind
from bitnet_train.formats.json_file import read_json
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.pretrained import load_for_training
from bitnet_train.training.checkpoint import save
from tests.folders import BOS, CODES, LINEARS, edit_config, edit_tensor, write_master, write_tokenizer

MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("fields", "format", "message"),
    [
        ({"attention_bias": True}, "gguf", "attention_bias must be false for GGUF"),
        ({"attention_bias": True}, "safetensors", "attention_bias must be false for .* use --linear-class bitlinear"),
        ({"hidden_act": "silu", "tie_word_embeddings": False}, "gguf", "tie_word_embeddings must be true for GGUF"),
        ({"hidden_size": 64}, "gguf", "multiple of 128 for I2_S, got 64"),
        ({"intermediate_size": 254}, "safetensors", "multiple of 4 to be packed, got 254"),
        ({"vocab_size": 200}, "gguf", r"every id must be below the model's vocab_size \(200\), got 292"),
        ({"vocab_size": 200}, "safetensors", r"every id must be below the model's vocab_size \(200\), got 292"),
    ],
)
def test_models_that_a_format_cannot_hold(
    tmp_path: Path, fields: dict[str, int | str], format: str, message: str
) -> None:
    write_master(tmp_path / "master", fields)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "master", tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == ["master"]


def test_tq_is_for_silu_models_only(tmp_path: Path) -> None:
    write_master(tmp_path / "master", {"hidden_size": 256})
    for type in ("tq1_0", "tq2_0"):
        with pytest.raises(UserError, match=f"hidden_act must be silu for {type}.*computes SiLU without a word.*relu2"):
            export(tmp_path / "master", tmp_path / "out.gguf", format="gguf", type=type)


def test_silu_and_biases_are_kept_where_they_can_be(tmp_path: Path) -> None:
    write_master(tmp_path / "silu", {"hidden_act": "silu"})
    write_master(tmp_path / "bias", {"attention_bias": True})
    export(tmp_path / "silu", tmp_path / "packed")
    for name, how in (("copy", {"format": "master"}), ("bitlinear", {"linear_class": "bitlinear"})):
        export(tmp_path / "bias", tmp_path / name, **how)  # type: ignore[arg-type]
        assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / name / "model.safetensors")


@pytest.mark.parametrize("stored", [{}, {"linear_class": "bitlinear"}, {"format": "gguf"}])
def test_codes_do_not_become_masters(master: Path, tmp_path: Path, stored: dict[str, Any]) -> None:
    export(master, tmp_path / "stored", **stored)
    with pytest.raises(UserError, match="holds ternary codes, which cannot be turned into masters; give"):
        export(tmp_path / "stored", tmp_path / "out", format="master")
    with pytest.raises(UserError, match="cannot be trained: the masters behind them are lost; start from"):
        load_for_training(tmp_path / "stored")


def test_a_dense_model_is_quantised_when_asked(master: Path, tmp_path: Path) -> None:
    edit_config(master, quantization_config=None)
    result = export(master, tmp_path / "packed", quantize=True)
    assert result.verification is not None
    assert result.verification.differ == 0
    assert folder_kind(tmp_path / "packed") == "packed"


def test_another_tokenizer_brings_its_ids(master: Path, tmp_path: Path) -> None:
    edit_config(master, bos_token_id=1, eos_token_id=2)
    (tmp_path / "tokenizer").mkdir()
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    export(master, tmp_path / "packed", tokenizer=tmp_path / "tokenizer")
    assert read_json(tmp_path / "packed" / "config.json")["bos_token_id"] == tokenizer.token_to_id(BOS)
    with pytest.raises(UserError, match=r"--tokenizer .*none: must be a folder with tokenizer\.json"):
        export(master, tmp_path / "out", tokenizer=tmp_path / "none")


def test_a_checkpoint_is_a_source(master: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(master, run / "model")
    tensors = load_file(master / "model.safetensors")
    tensors[MATRIX] = tensors[MATRIX] * 2
    config = BitNetConfig.from_json(read_json(master / "config.json")).to_json()
    save(run / "checkpoints", 7, {"model": tensors, "identity": {"model": json.dumps(config)}}, keep_last=1)
    for name in ("step-000007", "last"):
        result = export(run / "checkpoints" / name, tmp_path / f"{name}.gguf", format="gguf")
        assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
        assert verify(run, tmp_path / f"{name}.gguf").mismatches == (MATRIX,)
        assert GGUFFile(tmp_path / f"{name}.gguf").metadata["general.name"] == "run"

    (run / "checkpoints" / "last").unlink()  # as where there are no links
    (run / "checkpoints" / "last").write_text("step-000007\n")
    assert open_source(run / "checkpoints" / "last").path == run / "checkpoints" / "step-000007"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{", r"state\.pt: identity\.model: must be JSON"),
        ("[]", r"state\.pt: identity\.model: must hold a JSON object"),
        ("[" * 100_000, r"state\.pt: identity\.model: is nested more than 100 levels deep"),
        ("{}", "model_type must be 'bitnet', got None"),
    ],
)
def test_a_checkpoint_of_no_model_is_refused(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "step").mkdir()
    torch.save({"model": {"w": torch.zeros(1)}, "identity": {"model": model}}, tmp_path / "step" / "state.pt")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "step", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "step").mkdir()
    if content is None:
        torch.save({"weights": torch.zeros(1)}, tmp_path / "step" / "state.pt")
    else:
        (tmp_path / "step" / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt: (cannot be read|must hold the state of a run)"):
        export(tmp_path / "step", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": None}, "quantization_config must be there, got none"),
        ({"model_type": "llama", "quantization_config": None}, "model_type must be 'bitnet', got 'llama'"),
        ({"hidden_size": 256}, r"must have shape \(304, 256\), got \(304, 128\); the weights do not fit config.json"),
        ({"hidden_size": "128"}, "master/config.json: hidden_size: must be an integer or null, got a string"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.down_proj.weight must have shape .*, got none"),
        ({"num_hidden_layers": 1}, "got 11 unknown, such as model.layers.1"),
        ({"bos_token_id": 128000}, r"bos_token_id must be an id below vocab_size \(304\), got 128000"),
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
        (None, rf"tensor {MATRIX} must have shape \(128, 256\), got none"),
        (torch.zeros(128, 128), rf"tensor {MATRIX} must have shape \(128, 256\), got \(128, 128\)"),
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
    with pytest.raises(UserError, match=r"tokenizer\.json: must be there for GGUF, found none"):
        export(master, tmp_path / "model.gguf", format="gguf")
    export(master, tmp_path / "packed")
    assert not (tmp_path / "packed" / "tokenizer.json").exists()
