"""One run per directory."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.formats.file_lock import FileLock
from bitnet_train.training import ranks


class RunLock:
    """The lock on a run directory.

    Raises:
        UserError: another run holds it, or the directory cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        try:
            self.lock = FileLock(run_dir / ".lock")
        except OSError as error:
            raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror}); use another") from None

    def take(self) -> None:
        """Takes the lock."""
        if not self.lock.take():
            raise UserError(f"run_dir={self.run_dir}: another run is at work there; wait for it or use another")

    def check(self) -> None:
        """Fails if the directory is no longer the one that was locked.

        Raises:
            FileNotFoundError: it has vanished, or something else lies in its place.
        """
        if not self.lock.is_in_place():
            raise FileNotFoundError(errno.ENOENT, "the run directory has vanished", str(self.run_dir))


@contextmanager
def locked(run_dir: Path) -> Iterator[RunLock]:
    """Holds the lock for as long as the block runs; the first rank holds it for all.

    Raises:
        RunFailed: in the block a file was missing, and so is the directory.
    """
    lock = RunLock(run_dir)
    with lock.lock:
        ranks.on_first(lock.take)
        try:
            yield lock
        except OSError as error:
            _blame_what_vanished(lock, error)
            raise


def _blame_what_vanished(lock: RunLock, error: OSError) -> None:
    try:
        lock.check()
    except OSError as vanished:
        raise RunFailed(
            f"{vanished.strerror}: {vanished.filename} ({error}); see who removes it, then start the same command again"
        ) from None
