"""One number that differs is found in every format."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.export import export, verify
from bitnet_train.export.cli import run
from bitnet_train.formats.gguf_blocks import GGMLType
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_ternary import pack_ternary_blocks
from bitnet_train.formats.packing import pack_ternary, unpack_ternary
from bitnet_train.quant import quantize_weight
from tests.folders import LINEARS, edit_tensor

MATRIX, GGUF_MATRIX = "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"


def another(codes: torch.Tensor) -> torch.Tensor:
    """The codes with the first one changed."""
    changed = codes.clone()
    changed[0, 0] = (codes[0, 0] + 2) % 3 - 1
    return changed


@pytest.mark.parametrize("name", [MATRIX, f"{MATRIX}_scale", "model.norm.weight"])
def test_verify_finds_one_number_in_a_folder(master: Path, tmp_path: Path, name: str) -> None:
    export(master, tmp_path / "packed")
    tensor = load_file(tmp_path / "packed" / "model.safetensors")[name]
    if name == MATRIX:
        tensor = pack_ternary(another(unpack_ternary(tensor)))
    else:
        tensor[0] *= 2
    edit_tensor(tmp_path / "packed", name, tensor)
    verification = verify(master, tmp_path / "packed")
    assert verification.differ == 1
    assert verification.mismatches == (name.removesuffix("_scale"),)
    assert str(verification).startswith("not verified: ")


@pytest.mark.parametrize("part", ["code", "scale"])
def test_verify_finds_one_number_in_an_i2_s_file(master: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "model.gguf"
    export(master, path, format="gguf")
    codes, scale = quantize_weight(load_file(master / "model.safetensors")[MATRIX])
    changed = (another(codes), scale.item()) if part == "code" else (codes, scale.item() * 1.0000002)
    overwrite(path, pack_ternary_blocks(GGMLType.I2_S, *changed))
    assert verify(master, path).mismatches == (MATRIX,)
    assert verify(master, path).differ == 1


def test_verify_finds_one_number_in_a_float_file(master: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export(master, path, format="gguf", type="f16")
    codes, scale = quantize_weight(load_file(master / "model.safetensors")[MATRIX])
    values = (codes * scale).half()
    row, column = (codes == 1).nonzero()[0]
    values[row, column] = scale / 2  # neither 0 nor plus or minus the scale
    overwrite(path, values.view(torch.uint8).numpy().tobytes())
    assert verify(master, path).mismatches == (MATRIX,)
    assert verify(master, path).differ == 1


def overwrite(path: Path, data: bytes) -> None:
    """Puts other bytes in the place of the matrix of a GGUF file."""
    with path.open("r+b") as file:
        file.seek(GGUFFile(path).tensors[GGUF_MATRIX].offset)
        file.write(data)


def test_the_command_fails_when_the_packing_is_wrong(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "bitnet_train.export.gguf.pack_ternary_blocks", lambda kind, codes, g: pack_ternary_blocks(kind, -codes, g)
    )
    assert run([str(master), str(tmp_path / "model.gguf"), "--format", "gguf"]) == 1
    assert (tmp_path / "model.gguf").is_file()
    error = capsys.readouterr().err
    assert f"in {LINEARS} tensors, first model.layers.0.self_attn.q_proj.weight" in error
    assert error.count("\n") == 1
