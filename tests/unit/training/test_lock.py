"""One run per directory."""

import errno
import fcntl
import shutil
from pathlib import Path

import pytest

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.training.lock import locked

pytestmark = pytest.mark.fault


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another run is at work there"), locked(tmp_path):
        pass
    with locked(tmp_path) as lock:
        lock.check()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "its file system has no locks" in caplog.text


def test_a_directory_that_vanished_or_was_replaced_is_noticed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with locked(run_dir) as lock:
        run_dir.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="the run directory has vanished"):
            lock.check()
        run_dir.mkdir()
        with locked(run_dir), pytest.raises(FileNotFoundError):
            lock.check()
        shutil.rmtree(run_dir)
        (tmp_path / "moved").rename(run_dir)
        lock.check()


def test_what_is_missing_in_a_directory_that_vanished_is_said_as_such(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def work(clear: Path) -> None:
        with locked(run_dir):
            shutil.rmtree(clear)
            (run_dir / "reports/last").write_text("")

    (run_dir / "old").mkdir()
    with pytest.raises(FileNotFoundError):
        work(clear=run_dir / "old")
    with pytest.raises(RunFailed, match=f"the run directory has vanished: {run_dir} .*reports/last"):
        work(clear=run_dir)


def test_a_directory_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(UserError, match=r"run_dir=/proc: cannot be written \("), locked(Path("/proc")):
        pass
