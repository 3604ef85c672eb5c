"""Tokenized sequences on disk, read through a memory map: nothing of a corpus need fit into memory.

    tokens.bin      uint32: the ids of all sequences, one after another; bit 31 says that the token is trained
    ends.bin        int64: where each sequence ends in tokens.bin
    rows.bin        int64: the row of the source, counted from 0, that each sequence comes from
    manifest.json   the key that the store answers to, what was counted, the SHA-256 of the three files; written last

A document and a conversation are one sequence, a preference pair is two: prompt with chosen, prompt with rejected.
Numbers are little endian. While a store is being built, progress.json says how much of the three files is valid; what
stands behind it was torn off by a kill and is cut away.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_train.data.digests import array_digest, file_digest, fingerprint_of, sha256_of
from bitnet_train.formats.atomic import atomic_file

TRAINED = np.uint32(1 << 31)
_TOKEN, _INDEX = np.dtype("<u4"), np.dtype("<i8")
_FILES: dict[str, np.dtype[Any]] = {"tokens.bin": _TOKEN, "ends.bin": _INDEX, "rows.bin": _INDEX}
_MANIFEST, _PROGRESS = "manifest.json", "progress.json"
BAD_ROWS_NAMED = 3


@dataclass(frozen=True)
class Counts:
    """Counts of the rows that sequences were made of.

    Attributes:
        rows: that were read.
        tokens: that are kept.
        bad, bad_first: rows that were left out, and the messages of the first few.
        unread: names of fields that nothing was made of, sorted.
    """

    rows: int = 0
    tokens: int = 0
    bad: int = 0
    bad_first: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        first = (self.bad_first + other.bad_first)[:BAD_ROWS_NAMED]
        unread = tuple(sorted({*self.unread, *other.unread}))
        return Counts(self.rows + other.rows, self.tokens + other.tokens, self.bad + other.bad, first, unread)


def sequence(ids: Sequence[int], trained: Sequence[bool] | bool) -> np.ndarray:
    """Ids and their trained flags as one uint32 array, `(len(ids),)`."""
    return np.asarray(ids, dtype=_TOKEN) | np.where(trained, TRAINED, np.uint32(0))


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """The ids of a sequence, int64."""
    return (tokens & ~TRAINED).astype(np.int64)


def trained_of(tokens: np.ndarray) -> np.ndarray:
    """Which tokens of a sequence carry loss, bool."""
    trained: np.ndarray = (tokens & TRAINED) != 0
    return trained


class TokenStore:
    """Sequences of tokens, read only.

    Attributes:
        tokens: uint32 `(tokens,)`, see the module's text.
        ends: int64 `(sequences,)`.
        rows: int64 `(sequences,)`.
        counts: what it was made of.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, rows: np.ndarray, counts: Counts) -> None:
        self.tokens, self.ends, self.rows, self.counts = tokens, ends, rows, counts
        self._folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Maps the files of a sealed store; `is_intact` says whether they are what was written.

        The manifest's time of change is that of the last use, see `eviction`.
        """
        with suppress(OSError):  # a cache that may only be read
            os.utime(folder / _MANIFEST)
        tokens, ends, rows = (_map(folder / name, dtype) for name, dtype in _FILES.items())
        store = cls(tokens, ends, rows, counts_of(json.loads((folder / _MANIFEST).read_text())))
        store._folder = folder
        return store

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sequences: the same ids make the same fingerprint, wherever they come from."""
        if self._folder is None:
            return fingerprint_of([array_digest(self.tokens), array_digest(self.ends)])
        digests = json.loads((self._folder / _MANIFEST).read_text())["sha256"]
        return fingerprint_of([digests["tokens.bin"], digests["ends.bin"]])

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as the name of its folder."""
        if self._folder is None:
            return TokenStore, (self.tokens, self.ends, self.rows, self.counts)
        return TokenStore.open, (self._folder,)

    @property
    def size(self) -> int:
        """Tokens of all sequences."""
        return len(self.tokens)

    def piece(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) of all sequences joined, and where within them sequences end, (0, end - begin]."""
        first, last = np.searchsorted(self.ends, (begin, end), side="right")
        return self.tokens[begin:end], self.ends[first:last] - begin

    def last_end(self, limit: float) -> int:
        """Where the last sequence ends that lies within the first `limit` tokens; 0 if none does."""
        count = np.searchsorted(self.ends, limit, side="right")
        return int(self.ends[count - 1]) if count else 0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index`, uint32 `(length,)`: a view."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence, int64 `(sequences,)`."""
        return np.diff(self.ends, prepend=0)


def is_intact(folder: Path, key: str, memory: Path) -> bool:
    """Whether a folder is a sealed store with this key whose files are what was written.

    Args:
        memory: where the hashes of large files are remembered, see `digests.file_digest`.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        digests = {name: file_digest(folder / name, memory) for name in _FILES}
        return bool(manifest["key"] == key and manifest["sha256"] == digests)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class StoreWriter:
    """Appends sequences to a folder, goes on where a killed one was last committed, and seals it.

    The bytes depend on the sequences alone, not on how they are cut into calls of `append` or on kills between them.

    Args:
        folder: the store's future place; until `seal` the files are in a sibling, FOLDER.partial.
        key: what the store answers to.

    Attributes:
        counts: what the committed and appended part was made of.
        is_whole: the last sequence that was appended has ended: this can be committed.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.partial = folder, key, folder.with_name(f"{folder.name}.partial")
        progress = self._progress()
        self.counts, self.is_whole = counts_of(progress), True
        self._files = {name: _opened_at(self.partial / name, size) for name, size in progress["bytes"].items()}

    def _progress(self) -> dict[str, Any]:
        try:
            progress: dict[str, Any] = json.loads((self.partial / _PROGRESS).read_text())
            sizes = {name: (self.partial / name).stat().st_size for name in _FILES}
            if progress["key"] == self.key and all(sizes[name] >= progress["bytes"][name] for name in _FILES):
                return progress
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return {"bytes": dict.fromkeys(_FILES, 0), **asdict(Counts())}

    def append(self, ends: np.ndarray, tokens: np.ndarray, rows: np.ndarray, counts: Counts) -> None:
        """Adds tokens, in which sequences end at `ends`; what follows the last of them goes on in the next call.

        `ends` and `rows` count from the first token and row of this call, `counts` covers it.
        """
        if len(tokens):  # else nothing has changed
            self.is_whole = bool(len(ends) and ends[-1] == len(tokens))
        columns: tuple[np.ndarray, ...] = (
            tokens.astype(_TOKEN),
            (ends + self.counts.tokens).astype(_INDEX),
            (rows + self.counts.rows).astype(_INDEX),
        )
        for file, column in zip(self._files.values(), columns, strict=True):
            file.write(column.data)
        self.counts += counts

    def commit(self) -> None:
        """What was appended so far survives a kill."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        _write_json(self.partial / _PROGRESS, {"key": self.key, "bytes": sizes, **asdict(self.counts)})

    def close(self) -> None:
        """Closes the files; what was committed stays for the next writer, and nothing else does."""
        for file in self._files.values():
            file.close()
        if not (self.partial / _PROGRESS).exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def seal(self) -> None:
        """Makes the store whole and visible: manifest, then the name."""
        self.commit()
        digests = {name: sha256_of(self.partial / name) for name in _FILES}
        manifest = {"key": self.key, **asdict(self.counts), "sha256": digests}
        _write_json(self.partial / _MANIFEST, manifest)
        (self.partial / _PROGRESS).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)


def _map(file: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The file's numbers; numpy maps no empty file."""
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


def _opened_at(file: Path, size: int) -> Any:
    """The file, open for writing behind its first `size` bytes."""
    stream = file.open("ab")
    stream.truncate(size)
    stream.seek(size)
    return stream


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content))


def counts_of(content: dict[str, Any]) -> Counts:
    first, unread = (tuple(map(str, content[name])) for name in ("bad_first", "unread"))
    return Counts(int(content["rows"]), int(content["tokens"]), int(content["bad"]), first, unread)
