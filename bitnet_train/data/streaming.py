"""Documents that are tokenized when they are read, for corpora too large for a token cache.

    files -> `counting.BlockIndex` -> TokenStream -> `mixture` -> StreamedRows -> `order.BlockOrder`

The rows are those that a token cache gives, token by token, and have the same numbers. Only their order is another one:
to read a row the block in which it begins is tokenized, and the next rows of its lane come from the same block.

    memory    per process: the index, and a block of tokens for every row that a rank reads in an optimizer step
    a start   at any step: one block for each of these rows
    work      each rank tokenizes what it reads. Row and block do not end together: the first documents of a block are
              tokenized a second time, for the row that reaches into it
"""

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bitnet_train.data import counting
from bitnet_train.data.cache import content_of
from bitnet_train.data.digests import array_digest, fingerprint_of
from bitnet_train.data.encoding import Encoder
from bitnet_train.data.mixture import Span, joined
from bitnet_train.data.packing import StreamRows
from bitnet_train.data.paths import expand
from bitnet_train.data.sources import BadRow, Row, read_blocks
from bitnet_train.data.store import Counts
from bitnet_train.data.workers import encoded_rows
from bitnet_train.errors import UserError

Piece = tuple[np.ndarray, np.ndarray]  # tokens, and where documents end in them


class TokenStream:
    """All documents of some files, tokenized block by block: what a `TokenStore` of them gives (`mixture.Documents`).

    Args:
        paths: as for `sources.expand`.
        cache_dir: where token counts are kept.
        num_proc, bad_rows: as for `cache.tokenized`; they concern the counting.

    Attributes:
        starts: int64 `(blocks + 1,)`, tokens before each block.
        kept: a block stays in memory for so many rows after one that began in it.

    Raises:
        UserError: what `counting.counted` raises.
    """

    def __init__(
        self,
        paths: Sequence[str],
        encoder: Encoder,
        cache_dir: Path,
        num_proc: int | None = None,
        bad_rows: str = "error",
    ) -> None:
        self.files, self.encoder, self.kept = expand(paths), encoder, 1
        self._index = counting.counted(self.files, encoder, cache_dir, num_proc, bad_rows)
        self._content = content_of(self.files, encoder, cache_dir / "digests")
        self.starts = np.concatenate(([0], np.cumsum(self._index.tokens)))
        self._recent: dict[int, Piece] = {}
        self._reads: deque[int] = deque()  # the blocks of the last rows

    @property
    def size(self) -> int:
        """Tokens of all documents."""
        return int(self.starts[-1])

    @property
    def counts(self) -> Counts:
        """What was counted."""
        return self._index.counts

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the files hold, of what makes tokens of it, and of how many tokens each block has."""
        return fingerprint_of([self._content, array_digest(self._index.tokens)])

    def piece(self, begin: int, end: int) -> Piece:
        """See `Documents.piece`."""
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right") - 1
        blocks = range(int(first), int(last) + 1)
        starts, stops = self.starts[blocks].tolist(), self.starts[blocks.start + 1 : blocks.stop + 1].tolist()
        return joined(
            [
                self._part(block, max(begin - start, 0), min(end, stop) - start, block == first)
                for block, start, stop in zip(blocks, starts, stops, strict=True)
                if start < stop
            ]
        )

    def last_end(self, limit: float) -> int:
        """See `Documents.last_end`."""
        if limit < 1:
            return 0
        last = int(np.searchsorted(self.starts, limit, side="right")) - 1
        for block in range(min(last, len(self._index.tokens) - 1), -1, -1):  # in a long document no block has an end
            start, (_, ends) = int(self.starts[block]), self._whole(block)
            if end := int(ends[ends <= limit - start].max(initial=0)):
                return start + end
        return 0

    def _part(self, block: int, begin: int, end: int, is_first: bool) -> Piece:
        """Tokens [begin, end) of a block; of one that a row only reaches into, no more than these are made."""
        tokens, ends = self._whole(block) if is_first else self._recent.get(block) or self._head(block, end)
        return tokens[begin:end], ends[(ends > begin) & (ends <= end)] - begin

    def _whole(self, block: int) -> Piece:
        """A block, from memory or tokenized now."""
        if block not in self._recent:
            self._recent[block] = self._tokenized(block, self._rows(block))
        self._reads.append(block)
        while len(self._reads) > self.kept:
            oldest = self._reads.popleft()
            if oldest not in self._reads:
                del self._recent[oldest]
        return self._recent[block]

    def _head(self, block: int, tokens: int) -> Piece:
        """The beginning of a block, as much of it as has so many tokens."""
        pieces: list[Piece] = []
        for row in self._rows(block):
            pieces.append(self._encoded([row]))
            tokens -= len(pieces[-1][0])
            if tokens <= 0:
                return joined(pieces)
        raise self._changed(block)

    def _tokenized(self, block: int, rows: Sequence[Row | BadRow]) -> Piece:
        tokens, ends = self._encoded(rows)
        if len(tokens) != self._index.tokens[block]:
            raise self._changed(block)
        return tokens, ends

    def _encoded(self, rows: Sequence[Row | BadRow]) -> Piece:
        chunk = encoded_rows(self.encoder, rows)
        return chunk.tokens, chunk.ends

    def _rows(self, block: int) -> list[Row | BadRow]:
        file = self.files[self._index.file[block]]
        place, cut = self._index.place(block), self.encoder.cut
        found = next(read_blocks(file, place, counting.BLOCK_CHARACTERS, cut=cut), None)
        if found is None:
            raise self._changed(block)
        return found.rows

    def _changed(self, block: int) -> UserError:
        file = self.files[self._index.file[block]]
        return UserError(f"{file}: the file was changed while it is trained on; restore it, or start a new run_dir")


class StreamedRows(StreamRows):
    """`StreamRows` of streams, with an order in which few blocks are read at a time."""

    def __init__(
        self, streams: Sequence[TokenStream], spans: Sequence[Span], sequence_length: int, pad_id: int
    ) -> None:
        super().__init__(spans, sequence_length, pad_id)
        self.streams = streams

    def keep(self, blocks: int) -> None:
        """How many blocks are read in turns: at most so many of each stream stay in memory."""
        for stream in self.streams:
            stream.kept = blocks

    def rows_by_block(self) -> np.ndarray:
        """The rows that begin in each block of each span, int64 `(blocks,)`."""
        starts = [
            start + stream.starts[: np.searchsorted(stream.starts, span.tokens)]
            for start, span in zip(self.starts[:-1], self.spans, strict=True)
            for stream in (self.streams[span.source],)
        ]
        first_rows = -(-np.concatenate(starts) // self.sequence_length)
        return np.diff(first_rows, append=len(self))
