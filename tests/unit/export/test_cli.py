"""The command: its output, its exit codes, and what it never overwrites."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.cli import run
from tests.folders import CODES, LINEARS, edit_tensor, write_master

ROOT = Path(__file__).parents[3]


def test_the_command_prints_what_it_wrote(master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(master), str(tmp_path / "packed"), "--format", "safetensors", "--verify"]) == 0
    wrote, verified = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'packed'} (")
    assert verified == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"


def test_the_script_ends_with_2_and_one_line_for_wrong_input(tmp_path: Path) -> None:
    command = [sys.executable, "tools/export.py", str(tmp_path / "none"), str(tmp_path / "out"), "--format", "gguf"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'none'}: must be a finished run's directory or a model folder")
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--format"),
        (["--format", "onnx"], "invalid choice: 'onnx'"),
        (["--format", "gguf", "--type", "q4_0"], "invalid choice: 'q4_0'"),
        (["--format", "gguf", "--dtype", "float32"], "--dtype belongs to --format safetensors and master"),
        (["--format", "master", "--type", "f16"], "--type belongs to --format gguf"),
    ],
)
def test_wrong_options_are_refused(master: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run([str(master), str(tmp_path / "out"), *options])


def test_an_export_is_replaced_only_by_force(master: Path, tmp_path: Path) -> None:
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        export(master, tmp_path / target, format=format)
        with pytest.raises(UserError, match="must not exist yet"):
            export(master, tmp_path / target, format=format)
        export(master, tmp_path / target, format=format, force=True)
    assert sorted(os.listdir(tmp_path)) == ["master", "model.gguf", "packed"]


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_force_replaces_nothing_but_an_export(master: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / "letter").write_text("dear")
    for name in ("thesis", "letter"):
        with pytest.raises(UserError, match="--force replaces only"):
            export(master, tmp_path / name, format=format, force=True)
    assert (tmp_path / "thesis" / "chapter").is_file()


def test_force_does_not_replace_the_source_or_what_holds_it(tmp_path: Path) -> None:
    write_master(tmp_path / "run" / "model")
    for target in (tmp_path / "run" / "model", tmp_path / "run", tmp_path):
        with pytest.raises(UserError, match="must not be the model that is exported, or contain it"):
            export(tmp_path / "run", target, force=True)


def test_a_failed_export_leaves_the_earlier_one(master: Path, tmp_path: Path) -> None:
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        export(master, tmp_path / target, format=format)
    written = (tmp_path / "model.gguf").read_bytes(), (tmp_path / "packed" / "model.safetensors").read_bytes()
    edit_tensor(master, "model.layers.1.mlp.up_proj.weight", torch.full((256, 128), torch.nan))
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        with pytest.raises(UserError, match=r"up_proj\.weight: every value must be finite, got 32768 that are not"):
            export(master, tmp_path / target, format=format, force=True)
    assert written == ((tmp_path / "model.gguf").read_bytes(), (tmp_path / "packed" / "model.safetensors").read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["master", "model.gguf", "packed"]
