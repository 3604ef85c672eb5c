"""A second name for an entry of a folder: a symbolic link, or a text file that holds the name of the entry.

exFAT, SMB shares and some FUSE mounts have no links; git writes the same text files there.
"""

from pathlib import Path

_LONGEST = 255  # bytes of a name


def point(link: Path, name: str) -> None:
    """Makes `link` lead to the entry `name` beside it, at once, whatever it led to before.

    Raises:
        OSError: the disk does not take it, or a folder stands there.
    """
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except OSError:  # there are none; what else is wrong, the next line meets as well
        temporary.write_text(f"{name}\n", encoding="utf-8")
    temporary.replace(link)


def followed(path: Path) -> Path:
    """Where a path leads, links resolved; the path itself where nothing is there."""
    target = path.resolve()
    if target.is_file() and target.stat().st_size <= _LONGEST + 1:
        name = target.read_bytes().decode("utf-8", errors="replace").strip()
        if name not in ("", "..") and Path(name).name == name and (target.parent / name).is_dir():
            return target.parent / name
    return target
