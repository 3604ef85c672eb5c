"""One holder at a time, also where the file system knows no locks."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from bitnet_train.formats import file_lock
from bitnet_train.formats.file_lock import FileLock


def without_locks_in(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the folder cannot be locked, others can."""
    flock = fcntl.flock

    def refuse(descriptor: int, how: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    file_lock._warn.cache_clear()


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock") as first, FileLock(tmp_path / "lock") as second:
        assert first.take()
        assert not second.take()
    with FileLock(tmp_path / "lock") as third:
        assert third.take(wait=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_the_machine_keeps_its_own_processes_apart(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared, local = tmp_path / "shared", tmp_path / "local"
    shared.mkdir()
    local.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(local))
    without_locks_in(shared, code, monkeypatch)
    with FileLock(shared / "lock") as first, FileLock(shared / "lock") as second, FileLock(shared / "other") as third:
        assert first.take()
        assert not second.take()
        assert third.take()
    assert [record.message for record in caplog.records] == [
        f"{shared}: its file system has no locks ({os.strerror(code)}); let no two machines write there at once"
    ]


def test_without_any_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that somebody else has laid in the temporary folder is not followed."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    without_locks_in(tmp_path, errno.ENOSYS, monkeypatch)
    with FileLock(tmp_path / "lock") as lock:
        assert lock.take()
    (tmp_path / "missing").mkdir()
    with FileLock(tmp_path / "lock") as lock:
        lock.take()
        (name,) = (tmp_path / "missing").iterdir()
    name.unlink()
    name.symlink_to(tmp_path / "victim")
    with FileLock(tmp_path / "lock") as lock:
        assert lock.take()
    assert not (tmp_path / "victim").exists()


def test_who_waits_and_is_refused_has_the_lock_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EACCES says that another process holds a lock to who does not wait, and that there are none to who does."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    shared.mkdir()
    local.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(local))
    without_locks_in(shared, errno.EACCES, monkeypatch)
    with FileLock(shared / "lock") as first, FileLock(shared / "lock") as second:
        assert not first.take()
        assert first.take(wait=True)
        assert "its file system has no locks (Permission denied)" in caplog.text
        assert file_lock._open_substitute(second.path)
        with pytest.raises(BlockingIOError):
            fcntl.flock(file_lock._open_substitute(second.path), fcntl.LOCK_EX | fcntl.LOCK_NB)
