"""Checkpoints: whole or absent, verified, kept in number, refused to other runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.training import checkpoint


def state(step: int) -> dict[str, Any]:
    return {"identity": {"seed": 0}, "step": step, "model": {"w": torch.full((3,), float(step))}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 6, 9):
        checkpoint.save(tmp_path / "checkpoints", step, state(step), keep_last=2)
    return tmp_path / "checkpoints"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_are_kept_and_last_points_to_the_newest(folder: Path) -> None:
    assert names(folder) == {"step-000006", "step-000009", "last"}
    assert (folder / "last").resolve().name == "step-000009"
    loaded = checkpoint.load(folder / "last", {"seed": 0})
    assert loaded["model"]["w"].tolist() == [9.0] * 3


def test_a_failing_write_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, 12, state(12), keep_last=1)
    assert names(folder) == {"step-000006", "step-000009", "last"}
    assert checkpoint.newest(folder) == folder / "step-000009"


def test_leftovers_of_a_kill_are_swept(folder: Path) -> None:
    (folder / ".step-000012.123.tmp").mkdir()
    (folder / ".step-000012.123.tmp/state.pt").touch()
    (folder / ".last.tmp").symlink_to("step-000006")
    assert checkpoint.newest(folder) == folder / "step-000009"
    assert names(folder) == {"step-000006", "step-000009", "last"}


@pytest.mark.parametrize("damage", ["state", "manifest", "missing", "list"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(folder: Path, damage: str) -> None:
    newest = folder / "step-000009"
    if damage == "state":
        content = bytearray((newest / "state.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    elif damage == "missing":
        (newest / "state.pt").unlink()
    else:
        (newest / "manifest.json").write_text("[1]" if damage == "list" else "{")
    assert checkpoint.newest(folder) == folder / "step-000006"
    assert "step-000009.bad" in names(folder)


def test_later_steps_are_set_aside_when_a_run_starts_before_them(folder: Path) -> None:
    checkpoint.set_aside_after(folder, 6)
    assert names(folder) == {"step-000006", "step-000009.old", "last"}


def test_what_resume_asks_for(folder: Path) -> None:
    assert checkpoint.find(folder, "never") is None
    assert checkpoint.find(folder, "auto") == folder / "step-000009"
    assert checkpoint.find(folder, str(folder / "step-000006")) == folder / "step-000006"
    assert checkpoint.find(folder / "nothing", "auto") is None
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.find(folder, str(folder / "step-000003"))


def test_another_run_is_refused_with_the_differences(folder: Path) -> None:
    with pytest.raises(UserError, match=r"seed: 0 there, 1 now"):
        checkpoint.load(folder / "last", {"seed": 1})


def test_a_pickle_that_runs_code_does_not_run(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    checkpoint.save(folder, 12, {**state(12), "payload": Payload()}, keep_last=2)
    with pytest.raises(Exception, match=r"Weights only load failed"):
        checkpoint.load(folder / "last", {"seed": 0})
    assert not (tmp_path / "ran").exists()
