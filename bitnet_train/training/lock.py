"""One run per directory: a lock that the operating system frees when its holder dies, however that happens."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.training import ranks

log = logging.getLogger(__name__)

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # what file systems answer where another process holds the lock


class RunLock:
    """The lock on a run directory.

    Raises:
        UserError: another run holds it, or the directory cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        try:
            self.file: IO[str] = self.path.open("w")
        except OSError as error:
            raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror}); use another") from None

    def take(self) -> None:
        """Takes the lock; where the file system knows no locks, a warning is all that can be done."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            run_dir = self.path.parent
            if error.errno in _TAKEN:
                raise UserError(
                    f"run_dir={run_dir}: another run is at work there; wait for it or use another"
                ) from None
            log.warning("run_dir=%s: its file system has no locks (%s); start no second run there", run_dir, error)

    def check(self) -> None:
        """Fails if the directory is no longer the one that was locked.

        Raises:
            FileNotFoundError: it has vanished, or something else lies in its place.
        """
        if not self.path.exists() or not os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, "the run directory has vanished", str(self.path.parent))


@contextmanager
def locked(run_dir: Path) -> Iterator[RunLock]:
    """Holds the lock for as long as the block runs; the first rank holds it for all.

    Raises:
        RunFailed: in the block a file was missing, and so is the directory.
    """
    lock = RunLock(run_dir)
    with lock.file:
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
