"""How many tokens each block of a corpus makes: all that must be known to find a row without a token cache.

    CACHE_DIR/counts/KEY.npz    blocks   int64 (blocks + 1, 5): file and place where it begins, tokens of its rows
                                about    the key, what was counted, whether it is all

A block is some rows of a file, or parts of long ones, `BLOCK_CHARACTERS` of them or a little more. 40 bytes of index
stand for about 256 KB of text. Counting reads and tokenizes everything once and keeps nothing else; it is saved every
now and then, and goes on there after a kill. The last entry holds no tokens: it says where counting ended.
"""

import json
import os
import zipfile
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bitnet_train.data import workers
from bitnet_train.data.cache import key_of, locked, processes_for, refuse
from bitnet_train.data.digests import fingerprint_of
from bitnet_train.data.encoding import Encoder
from bitnet_train.data.hub import is_hub_id
from bitnet_train.data.progress import BuildProgress
from bitnet_train.data.readers import START, Place
from bitnet_train.data.sources import BadRow, Block, Row, read_blocks
from bitnet_train.data.store import Counts, counts_of
from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file

BLOCK_CHARACTERS = 1 << 18
_COLUMNS = 5
_SAVE_TOKENS = 1 << 26  # tokens between savings: what a kill can cost, a minute of one core


@dataclass(frozen=True)
class BlockIndex:
    """Where the blocks of some files begin.

    Attributes:
        file: int64 `(blocks,)`, the number of the file.
        offset, number, inside: int64 `(blocks,)`, see `readers.Place`.
        tokens: int64 `(blocks,)`, tokens of all rows of the block.
        counts: what was counted, see `store.Counts`.
    """

    file: np.ndarray
    offset: np.ndarray
    number: np.ndarray
    inside: np.ndarray
    tokens: np.ndarray
    counts: Counts

    def place(self, block: int) -> Place:
        """Where the block begins."""
        return Place(int(self.offset[block]), int(self.number[block]), int(self.inside[block]))


def counted(
    files: Sequence[str], encoder: Encoder, cache_dir: Path, num_proc: int | None = None, bad_rows: str = "error"
) -> BlockIndex:
    """The index of the files' blocks, from the cache or counted now.

    Args:
        num_proc, bad_rows: as for `cache.tokenized`.

    Raises:
        UserError: a hub id, what `read_blocks` raises, the error of the first bad row, or a cache that cannot be
            written.
    """
    for file in files:
        if is_hub_id(file):
            raise UserError(f"{file}: data.streaming reads files; download the data set, or leave out data.streaming")
    key = fingerprint_of([key_of(files, encoder, cache_dir / "digests"), BLOCK_CHARACTERS])
    path = cache_dir / "counts" / f"{key[:32]}.npz"
    counting = _Counting.load(path, key)
    if not counting.whole:
        with locked(path):
            counting = _Counting.load(path, key)
            if not counting.whole:
                _count(files, encoder, path, counting, num_proc or processes_for(files), bad_rows)
    return counting.index()


@dataclass
class _Counting:
    """An index as it grows: file, byte, row and tokens of every block, and of the place where to go on."""

    key: str
    blocks: "array[int]"
    counts: Counts
    whole: bool

    @classmethod
    def load(cls, path: Path, key: str) -> "_Counting":
        """What was saved; nothing if it is torn or answers to another key. The file's time is that of the last use."""
        with suppress(OSError):  # there is none, or the cache may only be read
            os.utime(path)
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                if about["key"] == key:
                    return cls(key, array("q", saved["blocks"].tobytes()), counts_of(about), bool(about["whole"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            pass
        return cls(key, array("q", (0, *START, 0)), Counts(), whole=False)

    def save(self, path: Path) -> None:
        """Writes it wholly or not at all."""
        about = json.dumps({"key": self.key, "whole": self.whole, **asdict(self.counts)})
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, blocks=np.array(self.blocks).reshape(-1, _COLUMNS), about=np.array(about))

    def index(self) -> BlockIndex:
        """All blocks."""
        file, offset, number, inside, tokens = np.array(self.blocks).reshape(-1, _COLUMNS)[:-1].T.copy()
        return BlockIndex(file, offset, number, inside, tokens, self.counts)

    def append(self, file: int, block: Block, counts: Counts) -> None:
        """The next block and what it holds."""
        self.blocks[-_COLUMNS:] = array("q", (file, *block.start, counts.tokens, file, *block.end, 0))
        self.counts += counts


def _count(
    files: Sequence[str], encoder: Encoder, path: Path, counting: _Counting, processes: int, bad_rows: str
) -> None:
    waiting: deque[tuple[int, Block]] = deque()  # given to the workers, not counted yet
    with BuildProgress(files) as progress:
        blocks = _blocks_from(files, encoder, counting.blocks[-_COLUMNS:], progress)
        saved = counting.counts.tokens
        with closing(workers.encoded_chunks(encoder, _rows(blocks, waiting), processes)) as chunks:
            for chunk in chunks:
                counting.append(*waiting.popleft(), chunk.counts)
                refuse(counting.counts, bad_rows)
                progress.show(counting.counts.tokens)
                if counting.counts.tokens - saved >= _SAVE_TOKENS:
                    counting.save(path)
                    saved = counting.counts.tokens
    replace(counting, whole=True).save(path)


def _blocks_from(
    files: Sequence[str], encoder: Encoder, last: "array[int]", progress: BuildProgress
) -> Iterator[tuple[int, Block]]:
    first, *place, _ = last
    start = Place(*place)
    for file in range(first, len(files)):
        for block in read_blocks(files[file], start, BLOCK_CHARACTERS, progress.read, encoder.cut):
            yield file, block
        start = START


def _rows(blocks: Iterator[tuple[int, Block]], waiting: deque[tuple[int, Block]]) -> Iterator[list[Row | BadRow]]:
    for file, block in blocks:
        waiting.append((file, block._replace(rows=[])))
        yield block.rows
