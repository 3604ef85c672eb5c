"""Files with code that nobody else can have written: as sshd checks a key (StrictModes), and then its folders.

Whoever can write a file, replace it or a folder above it, or turn a link on the way can run code as its reader. Folders
are checked by name, from the root on: then the user and root alone can change what the name means. A file is opened
once, checked through its descriptor and loaded through it, so that what was checked is what is used.
"""

import grp
import hashlib
import os
import pwd
import stat
from pathlib import Path

_DIGEST = 32  # bytes of a SHA-256


def own_folder(folder: Path) -> Path:
    """The folder's path without links.

    Raises:
        PermissionError: another user can change what the path leads to.
    """
    resolved = folder.resolve(strict=True)
    for start in (folder.absolute(), resolved):
        for part in (*reversed(start.parents), start):
            _check(part.lstat(), part)
    return resolved


def open_own(file: Path) -> int:
    """A descriptor of a sealed file.

    Raises:
        OSError: there is none, it is a link, another user can have written it, or it is not as it was sealed.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{file} is no file")
        _check(status, file)
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read()
        if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
            raise OSError(f"{file} is damaged")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def seal(file: Path) -> None:
    """Puts the SHA-256 of a file at its end, where ELF allows anything; others may not write it from now on."""
    file.chmod(0o700)
    with file.open("r+b") as stream:
        stream.write(hashlib.sha256(stream.read()).digest())


def _check(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError where the entry, or what lies in it, can be changed by another user."""
    mode = status.st_mode
    if status.st_uid not in _trusted():
        raise PermissionError(f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    alone = stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)  # in /tmp each removes only their own
    if not alone and _others_write(status):
        raise PermissionError(
            f"{path} can be written by others: chmod go-w {path}, or set XDG_CACHE_HOME to a folder of your own"
        )


def _trusted() -> set[int]:
    """The user, root, and who owns the root folder: in a container, root may have another number."""
    return {os.geteuid(), 0, os.lstat("/").st_uid}


def _others_write(status: os.stat_result) -> bool:
    group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or group)


def _is_private(group: int) -> bool:
    """Whether a group is the user's alone, by its name and members: where each user has one, umask 002 is usual."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}
