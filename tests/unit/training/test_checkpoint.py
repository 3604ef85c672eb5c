"""Checkpoints: whole or absent, verified, kept in number, refused to other runs."""

import errno
import os
import pickle
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.training import checkpoint
from tests.faults import limited
from tests.states import tiny_state as state

pytestmark = pytest.mark.fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 6, 9):
        checkpoint.save(tmp_path / "checkpoints", step, state(step), keep_last=2)
    return tmp_path / "checkpoints"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system takes rights that this process lacks")
    yield disk
    subprocess.run(["umount", disk], check=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_are_kept_and_last_points_to_the_newest(folder: Path) -> None:
    assert names(folder) == {"step-000006", "step-000009", "last"}
    assert (folder / "last").resolve().name == "step-000009"
    loaded = checkpoint.load(folder / "last", {"seed": 0})
    assert loaded["model"]["w"].tolist() == [9.0] * 3


def test_a_failing_write_leaves_what_was_there(folder: Path) -> None:
    large = {**state(12), "model": {"w": torch.zeros(100_000)}}
    with limited(resource.RLIMIT_FSIZE, 50_000), pytest.raises(OSError, match=r"\[Errno"):
        checkpoint.save(folder, 12, large, keep_last=1)
    assert names(folder) == {"step-000006", "step-000009", "last"}
    assert checkpoint.newest(folder) == folder / "step-000009"


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpoint.save(folder, 3, {**state(3), "model": {"w": torch.zeros(100_000)}}, keep_last=1)
    with pytest.raises(OSError, match=r"\[Errno"):
        checkpoint.save(folder, 6, {**state(6), "model": {"w": torch.zeros(200_000)}}, keep_last=1)
    assert names(folder) == {"step-000003", "last"}
    assert checkpoint.newest(folder) == folder / "step-000003"


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without symbolic links: exFAT, SMB."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)


@pytest.mark.usefixtures("no_links")
def test_without_links_text_files_say_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_with(tmp_path, {1: 1.0, 2: 3.0, 3: 2.0}, keep_last=1, keep_best=1)
    assert names(tmp_path) == {"step-000001", "step-000003", "last", "best"}
    assert (tmp_path / "last").read_text() == "step-000003\n"
    assert checkpoint.find(tmp_path, str(tmp_path / "last")) == tmp_path / "step-000003"
    assert checkpoint.find(tmp_path, str(tmp_path / "best")) == tmp_path / "step-000001"
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step-000003"
    assert not caplog.records


def test_what_the_disk_refuses_beside_a_checkpoint_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a copy whose links became folders."""
    (folder / "last").unlink()
    (folder / "last").mkdir()
    checkpoint.save(folder, 12, state(12), keep_last=1)
    assert "the new checkpoint is whole" in caplog.text
    assert checkpoint.newest(folder) == folder / "step-000012"
    assert names(folder) >= {"step-000012", "last"}
    assert not names(folder) & {"step-000006", "step-000009"}


def test_checkpoints_that_vanish_while_they_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [*checkpoint._steps(folder), folder / "step-000010", folder / "step-000011"]
    monkeypatch.setattr(checkpoint, "_steps", lambda _: found)
    assert checkpoint.newest(folder) == folder / "step-000009"
    checkpoint.retain(folder / "step-000009", keep_last=1, keep_best=1)
    assert names(folder) == {"last"}


def save_with(folder: Path, losses: dict[int, float | None], keep_last: int, keep_best: int) -> None:
    for step, loss in losses.items():
        checkpoint.save(folder, step, state(step), keep_last, keep_best, loss)


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    save_with(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 1.0, 7: 4.0}, keep_last=1, keep_best=2)
    assert names(tmp_path) == {"step-000002", "step-000006", "step-000007", "last", "best"}
    assert (tmp_path / "best").resolve().name == "step-000002"
    save_with(tmp_path, {8: 0.5}, keep_last=1, keep_best=2)
    assert names(tmp_path) == {"step-000002", "step-000008", "last", "best"}
    assert (tmp_path / "best").resolve().name == "step-000008"


def test_leftovers_of_a_kill_are_swept(folder: Path) -> None:
    (folder / ".step-000012.1234abcd.tmp").mkdir()
    (folder / ".step-000012.1234abcd.tmp/state.pt").touch()
    (folder / ".last.tmp").symlink_to("step-000006")
    (folder / "last").unlink()
    (folder / "step-000003").mkdir()
    checkpoint.settle(folder, keep_last=2, keep_best=0)
    assert checkpoint.newest(folder) == folder / "step-000009"
    assert names(folder) == {"step-000006", "step-000009", "last"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "list": lambda file: file.write_text("[1]"),
    "other": lambda file: file.write_text('{"metrics.json": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.pt", "metrics.json", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    folder: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint.save(folder, 12, state(12), keep_last=2, loss=1.0)
    DAMAGES[damage](newest / name)
    with pytest.raises(UserError, match=r"damaged \(manifest\.json does not verify\)|no checkpoint there"):
        checkpoint.find(folder, str(newest))
    assert checkpoint.newest(folder) == folder / "step-000009"
    assert "step-000012 is damaged and set aside as step-000012.bad" in caplog.text
    assert "step-000012.bad" in names(folder)


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
    with pytest.raises(UserError, match=r"last/state\.pt: holds more than tensors and plain containers"):
        checkpoint.load(folder / "last", {"seed": 0})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1])])
def test_a_file_that_is_no_state_is_refused_in_one_line(folder: Path, content: bytes) -> None:
    (folder / "step-000009/state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"step-000009/state\.pt: "):
        checkpoint.load(folder / "step-000009", {"seed": 0})


def test_what_may_differ_and_what_never(folder: Path) -> None:
    identity = {"seed": 1, "model": "tiny"}
    with pytest.raises(UserError, match=r"model: \{\} there, tiny now\)"):
        checkpoint.load(folder / "last", identity, allowed=["seed"])
    assert checkpoint.load(folder / "last", {"seed": 1}, allowed=["seed"])["step"] == 9
    with pytest.raises(UserError, match=r"resume_allow must name some of seed, got 'model'"):
        checkpoint.load(folder / "last", identity, allowed=["model"])
