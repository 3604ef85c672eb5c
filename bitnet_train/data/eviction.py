"""Room in the cache again: what it holds, by last use, and removing what was not used for longest.

    CACHE_DIR/tokens/KEY/               a token store; KEY.partial: one that is being built, or was until a kill
    CACHE_DIR/counts/KEY.npz            the index of a corpus that is streamed
    CACHE_DIR/reference-*.safetensors   log-probabilities of DPO's reference

All of it is made again when it is wanted again. A store that a process is building now is left alone, and a run that
has one open keeps reading it: its bytes live until the run ends. An index is in the memory of a run that uses it.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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
    return sorted(map(_entry, _paths(cache_dir)), key=lambda entry: -entry.used)


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


def _entry(path: Path) -> Entry:
    files = list(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files] or [path.stat()]
    return Entry(path, sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats), _tokens(path))


def _tokens(path: Path) -> int | None:
    try:
        return int(json.loads((path / "manifest.json").read_text())["tokens"])
    except (OSError, ValueError, KeyError):
        return None


def _remove(path: Path) -> bool:
    """Whether it could be removed: nobody is building it."""
    if path.is_file():
        path.unlink()
        return True
    with path.with_name(f"{path.name.removesuffix('.partial')}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path)
        return True
