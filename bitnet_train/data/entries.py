"""Checks of a name of data: files and folders are read, more than once; nothing else can be."""

import os
import stat
from pathlib import Path

from bitnet_train.data.readers import FORMATS
from bitnet_train.errors import UserError, is_utf8

_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_name(name: str) -> None:
    """Raises UserError where the name is no text: it stands in files of JSON, YAML and UTF-8."""
    if not is_utf8(name) or "\0" in name:
        raise UserError(f"{name}: the name is not UTF-8; rename it, as with convmv -f latin1 -t utf8 --notest")


def check_entry(path: Path) -> None:
    """Raises UserError where there is no file and no folder, but a pipe, a broken link or what cannot be reached."""
    check_name(str(path))
    if is_broken_link(path):
        raise UserError(f"{path}: a broken symbolic link to {os.readlink(path)}; mend it or take it out")
    try:
        kind = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
    except OSError as error:
        raise unreadable(path, error) from None
    if kind is not None:
        raise UserError(f"{path}: {kind}, and data is read more than once; write it to a file: {FORMATS}")


def is_broken_link(path: Path) -> bool:
    """Whether the path is a symbolic link that leads to nothing, or to itself."""
    return os.path.islink(path) and not os.path.exists(path)


def unreadable(path: Path | str, error: OSError) -> UserError:
    """The error of a path that the operating system refuses."""
    return UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")
