"""A lock on a file, which the operating system frees when its holder dies, however that happens.

Some file systems know no locks (Lustre mounted without `flock`, some FUSE mounts). There a lock of the same name in the
machine's temporary folder keeps its own processes apart, and a warning says that those of other machines are not.
"""

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # what file systems answer where another process holds the lock


class FileLock:
    """The lock; it is held from `take` until the end of a `with` block, or of the process.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w")
        self._substitute: int | None = None

    def take(self, wait: bool = False) -> bool:
        """Whether this process has the lock now.

        Args:
            wait: until another process frees it; the answer is always True.
        """
        try:
            return _lock(self._file.fileno(), wait)
        except OSError as error:
            _warn(self.path.parent, str(error.strerror))
        try:
            self._substitute = _open_substitute(self.path)
            return _lock(self._substitute, wait)
        except OSError:
            return True

    def is_in_place(self) -> bool:
        """Whether the path still names the file that was opened."""
        return self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._substitute is not None:
            os.close(self._substitute)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _TAKEN and not wait:  # who waits is never told that it is taken
            return False
        raise
    return True


def _open_substitute(path: Path) -> int:
    """A file of this user; a link that somebody else has laid there is not followed."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    name = Path(tempfile.gettempdir()) / f"bitnet-train-{os.getuid()}-{digest}.lock"
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@cache
def _warn(folder: Path, reason: str) -> None:
    log.warning("%s: its file system has no locks (%s); let no two machines write there at once", folder, reason)
