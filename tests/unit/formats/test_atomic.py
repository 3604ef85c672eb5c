"""A write happens wholly or not at all."""

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file, atomic_folder, sweep


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with atomic_file(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "content"
    assert os.listdir(target.parent) == ["file"]


def test_a_folder_replaces_another_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(target) == ["second"]
    assert os.listdir(tmp_path) == ["folder"]


def fail_halfway(writing: AbstractContextManager[Path]) -> None:
    with writing as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise RuntimeError


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert os.listdir(tmp_path / "link") == ["new"]
    assert os.listdir(tmp_path / "real") == ["old"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError):
        fail_halfway(atomic_file(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "old").touch()
    with pytest.raises(RuntimeError):
        fail_halfway(atomic_folder(tmp_path / "folder"))
    assert os.listdir(tmp_path / "folder") == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.fault
@pytest.mark.parametrize("function", ["atomic_file", "atomic_folder"])
def test_a_kill_leaves_the_old_one(tmp_path: Path, function: str) -> None:
    target = tmp_path / "target"
    with atomic_file(target) if function == "atomic_file" else atomic_folder(target) as temporary:
        (temporary if function == "atomic_file" else temporary / "file").write_text("old")
    script = (
        "import os, pathlib, signal, sys\n"
        f"from bitnet_train.formats.atomic import {function}\n"
        f"with {function}(pathlib.Path(sys.argv[1])) as path:\n"
        "    (path / 'file' if path.is_dir() else path).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(target)], cwd=Path(__file__).parents[3], timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert (target if target.is_file() else target / "file").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: File exists"), atomic_file(tmp_path / "file" / "target"):
        pass


def test_what_killed_writes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".model.0123abcd.tmp", ".model.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".init_from.txt.0123abcd.tmp").touch()
    others = {".bashrc.old", ".lock", ".tmp", "model.0123abcd.tmp"}
    for name in others:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others
