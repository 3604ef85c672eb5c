"""Writing that happens wholly or not at all: a temporary sibling, fsync, rename.

A reader sees the old content or the new one; a link is replaced, what it points at stays. An exception removes the
temporary name; after a kill it stays, hidden (`.NAME.1a2b3c4d.tmp`), beside an untouched target, until somebody who
knows that nobody else is writing calls `sweep`.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_train.errors import UserError

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a path to write; it becomes `target`, replacing a file there, when the block ends without an exception."""
    temporary = _temporary(target)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(target.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` when the block ends without an exception.

    A folder cannot be renamed onto a filled one, so an old `target` first moves aside and is deleted last.
    """
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        fsync(temporary)
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(target.parent)


def _temporary(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: its folder cannot be made: {error.strerror}; give another name") from None
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _replace_folder(new: Path, target: Path) -> None:
    old = new.with_suffix(".old")
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed writes have left in a folder. Nobody may be writing into it."""
    for path in folder.glob(".*"):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def fsync(path: Path) -> None:
    """Puts the content of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
