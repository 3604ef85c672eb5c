"""Room in the cache again: what it holds, by last use, and removing what was not used for longest.

    CACHE_DIR/tokens/KEY/               a token store; KEY.partial: one that is being built, or was until a kill
    CACHE_DIR/counts/KEY.npz            the index of a corpus that is streamed
    CACHE_DIR/reference-*.safetensors   log-probabilities of DPO's reference

All of it is made again when it is wanted again. A store that a process is building now is left alone, and a run that
has one open keeps reading it: its bytes live until the run ends. An index is in the memory of a run that uses it. What
vanishes while it is looked at is left out: runs and other commands are at work here.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from bitnet_train.errors import UserError
from bitnet_train.formats.file_lock import FileLock
from bitnet_train.formats.json_file import read_json


@dataclass(frozen=True)
class Entry:
    """A folder or a file of the cache: `size` in bytes, `used` in seconds since the epoch.

    `tokens` counts those of a token store; None for what is none, or is not whole.
    """

    path: Path
    size: int
    used: float
    tokens: int | None


def entries(cache_dir: Path) -> list[Entry]:
    """What the cache holds, the last used first."""
    found = (entry for path in _paths(cache_dir) if (entry := _entry(path)) is not None)
    return sorted(found, key=lambda entry: -entry.used)


def evict(cache_dir: Path, keep: int) -> list[Entry]:
    """Removes what was not used for longest until at most `keep` bytes are left; returns what is gone."""
    gone, left = [], 0
    for entry in entries(cache_dir):
        left += entry.size
        if left > keep and _remove(entry.path):
            left -= entry.size
            gone.append(entry)
    return gone


def _paths(cache_dir: Path) -> Iterator[Path]:
    yield from (path for path in (cache_dir / "tokens").glob("*") if path.is_dir())
    yield from cache_dir.glob("counts/*.npz")
    yield from cache_dir.glob("reference-*.safetensors")


class _Manifest(TypedDict):
    tokens: int


def _entry(path: Path) -> Entry | None:
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        stats = [file.stat() for file in files] or [path.stat()]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
    return Entry(path, sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats), _tokens(path))


def _tokens(path: Path) -> int | None:
    try:
        return int(read_json(path / "manifest.json", _Manifest)["tokens"])
    except UserError:
        return None


def _remove(path: Path) -> bool:
    """Whether it is gone: nobody is building it, and it could be removed."""
    try:
        if path.is_file():
            path.unlink(missing_ok=True)
            return True
        with FileLock(path.with_name(f"{path.name.removesuffix('.partial')}.lock")) as lock:
            if lock.take():
                shutil.rmtree(path)
            return not path.exists()
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be removed ({error.strerror}); check its permissions") from None
