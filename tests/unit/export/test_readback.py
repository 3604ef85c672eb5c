"""One number that differs is found in every format, and what differs is not kept."""

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export, verify
from bitnet_train.export import readback as module
from bitnet_train.export.cli import run
from bitnet_train.export.readback import NotVerifiedError, Readback
from bitnet_train.formats.gguf_blocks import GGMLType
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_ternary import pack_ternary_blocks
from bitnet_train.formats.packing import pack_ternary, unpack_ternary
from bitnet_train.formats.safetensors_file import stored_tensors
from bitnet_train.model.weights import Weights
from bitnet_train.quant import TernaryWeight, quantize_weight
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


def overwrite(path: Path, data: bytes | memoryview) -> None:
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
    assert os.listdir(tmp_path) == ["master"]  # nothing has the name that was asked for
    error = capsys.readouterr().err
    assert f"in {LINEARS} tensors, first model.layers.0.self_attn.q_proj.weight" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_a_byte_that_the_disk_changed_is_found(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """What is compared are the bytes of the file, not those that were made."""
    compare = Readback.written

    def written(self: Readback, path: Path, name: str) -> None:
        if name == MATRIX:
            change_a_code(path)
        compare(self, path, name)

    monkeypatch.setattr(Readback, "written", written)
    with pytest.raises(
        NotVerifiedError, match=rf"out: not verified: .* 1 differ, in 1 tensors, first {MATRIX}; it was"
    ):
        export(master, tmp_path / "out", format=format)
    assert os.listdir(tmp_path) == ["master"]


def change_a_code(path: Path) -> None:
    """Changes the code in the lowest bits of the matrix's first byte, in a GGUF file or a folder."""
    path, tensors = (
        (path / "model.safetensors", stored_tensors(path / "model.safetensors"))
        if path.is_dir()
        else (path, {MATRIX: GGUFFile(path).tensors[GGUF_MATRIX]})
    )
    with path.open("r+b") as file:
        file.seek(tensors[MATRIX].offset)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ (3 if byte & 3 == 2 else 1)]))


def test_every_matrix_is_quantised_once(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised: list[torch.Size] = []

    def quantize(weight: torch.Tensor) -> TernaryWeight:
        quantised.append(weight.shape)
        return quantize_weight(weight)

    monkeypatch.setattr("bitnet_train.model.weights.quantize_weight", quantize)
    for target, format in (("out.gguf", "gguf"), ("out", "safetensors")):
        quantised.clear()
        result = export(master, tmp_path / target, format=format)
        assert result.verification is not None
        assert result.verification.differ == 0
        assert len(quantised) == LINEARS


def test_few_matrices_wait_for_a_slow_comparison(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, waiting = 0, []
    differs, compare = module._matrix_differs, Readback.written

    def slow(trained: Weights, found: Weights, name: str, made: TernaryWeight | None) -> int:
        nonlocal compared
        time.sleep(0.005)
        count = differs(trained, found, name, made)
        compared += 1
        return count

    def written(self: Readback, path: Path, name: str) -> None:
        compare(self, path, name)
        waiting.append(sum("_proj" in name for name in self._counts) - compared)

    monkeypatch.setattr(module, "_matrix_differs", slow)
    monkeypatch.setattr(Readback, "written", written)
    export(master, tmp_path / "out.gguf", format="gguf")
    assert max(waiting) <= 4
    assert waiting[-1] == 0  # all are compared before the file gets its name


def test_bytes_that_are_no_codes_are_named_and_do_not_stay(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet_train.export.folders.pack_ternary", lambda codes: pack_ternary(codes).fill_(255))
    with pytest.raises(UserError, match=r"self_attn.q_proj.weight: every two bits of packed codes must be 0, 1 or 2"):
        export(master, tmp_path / "packed")
    assert os.listdir(tmp_path) == ["master"]


def test_an_earlier_export_stays_where_the_new_one_is_wrong(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(master, tmp_path / "model.gguf", format="gguf")
    earlier = (tmp_path / "model.gguf").read_bytes()
    monkeypatch.setattr(
        "bitnet_train.export.gguf.pack_ternary_blocks", lambda kind, codes, g: pack_ternary_blocks(kind, -codes, g)
    )
    with pytest.raises(NotVerifiedError):
        export(master, tmp_path / "model.gguf", format="gguf", force=True)
    assert (tmp_path / "model.gguf").read_bytes() == earlier


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_matrices_of_zeros_are_named(master: Path, tmp_path: Path, format: str) -> None:
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    edit_tensor(master, first, torch.zeros(256, 128))
    edit_tensor(master, second, torch.zeros(64, 128))
    result = export(master, tmp_path / "out", format=format)
    assert result.notes[-1] == f"2 matrices are all zero: {first}, {second}"
    again = export(tmp_path / "out", tmp_path / "again", linear_class="bitlinear")
    assert again.notes[-1] == result.notes[-1]
    assert again.verification is not None
    assert again.verification.differ == 0
