"""From sequences to rows of a fixed length: a stream that is cut (pre-training) or whole bins (conversations).

A row has sequence_length + 1 ids, so that it gives sequence_length positions with a label each. Rows of a stream
overlap by that one id: every token of a corpus but the first of each document is predicted exactly once per epoch.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet_train.data.batches import PairBatch, TokenBatch, TokenRow, collate
from bitnet_train.data.digests import array_digest, fingerprint_of
from bitnet_train.data.mixture import Items, Span, joined
from bitnet_train.data.store import ids_of, trained_of


class StreamRows:
    """Documents joined to one stream and cut every `sequence_length` ids. The last row may be shorter.

    Args:
        spans: token ids of documents, each beginning with BOS and ending with EOS.
        sequence_length: positions per row.
    """

    def __init__(self, spans: Sequence[Span], sequence_length: int, pad_id: int) -> None:
        self.spans, self.sequence_length, self.pad_id = spans, sequence_length, pad_id
        self.starts = np.array([0, *accumulate(span.tokens for span in spans)])
        self.source_count = 1 + max(span.source for span in spans)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the stream and of where its documents end."""
        return fingerprint_of([(span.store.fingerprint, span.tokens) for span in self.spans])

    def collate(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """See `batches.collate`."""
        return collate(rows, self.pad_id)

    def __len__(self) -> int:
        return max(1, -(-(int(self.starts[-1]) - 1) // self.sequence_length))

    def _pieces(self, index: int, overlap: int) -> list[tuple[Span, int, int]]:
        """What of which spans makes up a row with `overlap` ids of the next one: begin and end within the span."""
        begin = index * self.sequence_length
        end = min(begin + self.sequence_length + overlap, int(self.starts[-1]))
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right") - 1
        numbers = range(int(first), int(last) + 1)
        starts = [int(self.starts[n]) for n in numbers]
        return [
            (self.spans[n], max(begin - start, 0), min(end - start, self.spans[n].tokens))
            for n, start in zip(numbers, starts, strict=True)
        ]

    def __getitem__(self, index: int) -> TokenRow:
        pieces = [span.store.piece(begin, end) for span, begin, end in self._pieces(index, overlap=1)]
        tokens, ends = joined(pieces)
        cuts = np.zeros(len(tokens) + 1, dtype=np.int64)
        cuts[ends] = 1
        return TokenRow(ids_of(tokens), np.ones(len(tokens), dtype=np.int64), np.cumsum(cuts[:-1]))

    def tokens_by_source(self, index: int) -> np.ndarray:
        """Tokens of each source that the row begins with, int64 `(sources,)`; the overlap is the next row's."""
        counts = np.zeros(self.source_count, dtype=np.int64)
        for span, begin, end in self._pieces(index, overlap=0):
            counts[span.source] += end - begin
        return counts


class PackedRows:
    """Conversations put together to rows of at most `sequence_length + 1` ids, none of them cut.

    Args:
        items: one sequence each, which fits into a row.
        sequence_length: positions per row.
    """

    def __init__(self, items: Items, sequence_length: int, pad_id: int) -> None:
        self.items, self.pad_id, self.capacity = items, pad_id, sequence_length + 1
        bins = best_fit(items.lengths, self.capacity)
        self._members = np.argsort(bins, kind="stable")  # row by row, within a row in the order of the items
        self._ends = np.cumsum(np.bincount(bins))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the conversations and of how they are packed."""
        return _fingerprint(self.items, self._members, self._ends)

    @property
    def efficiency(self) -> float:
        """The share of the rows' ids that are no padding, were every row padded to its full length."""
        return float(self.items.lengths.sum() / (len(self) * self.capacity))

    def collate(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """See `batches.collate`."""
        return collate(rows, self.pad_id)

    def __len__(self) -> int:
        return len(self._ends)

    def members(self, index: int) -> np.ndarray:
        """The items of a row, int64."""
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __getitem__(self, index: int) -> TokenRow:
        members = self.members(index)
        tokens = np.concatenate([self.items.sequence(item) for item in members])
        documents = np.repeat(np.arange(len(members)), self.items.lengths[members])
        return TokenRow(ids_of(tokens), trained_of(tokens).astype(np.int64), documents)

    def tokens_by_source(self, index: int) -> np.ndarray:
        """Tokens of each source in the row, int64 `(sources,)`."""
        return _by_source(self.items, self.members(index))


class PairRow(NamedTuple):
    """A preference pair and its number: two rows of prompt and completion, the completion trained."""

    number: int
    chosen: TokenRow
    rejected: TokenRow


class PairRows:
    """Preference pairs, a row per completion.

    Args:
        items: two sequences each, prompt and chosen, prompt and rejected.

    Attributes:
        fingerprint: hash of every id and mask; with the weights' hash it names the cached reference.
        lengths: tokens of each pair, int64 `(pairs,)`.
        reference_logps: float32 `(2, pairs)`, set by the DPO stage before training.
    """

    def __init__(self, items: Items, pad_id: int) -> None:
        self.items, self.pad_id = items, pad_id
        self.lengths = items.lengths
        self.reference_logps: Tensor | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every pair."""
        return _fingerprint(self.items, self.items.lengths)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> PairRow:
        return PairRow(index, *(_document(self.items.sequence(index, which)) for which in range(2)))

    def collate(self, pairs: Sequence[PairRow]) -> PairBatch:
        """Chosen rows, then rejected rows, padded to the longest; the reference is NaN until it is known."""
        tokens = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], self.pad_id)
        if self.reference_logps is None:
            return PairBatch(tokens, torch.full((2, len(pairs)), float("nan")))
        return PairBatch(tokens, self.reference_logps[:, [p.number for p in pairs]])

    def tokens_by_source(self, index: int) -> np.ndarray:
        """Tokens of each source in the pair, int64 `(sources,)`."""
        return _by_source(self.items, np.array([index]))


def _document(tokens: np.ndarray) -> TokenRow:
    return TokenRow(ids_of(tokens), trained_of(tokens).astype(np.int64), np.zeros(len(tokens), dtype=np.int64))


def _fingerprint(items: Items, *arrangement: np.ndarray) -> str:
    stores = [store.fingerprint for store in items.stores]
    arrays = (items.source, items.number, *arrangement)
    return fingerprint_of([stores, *(array_digest(array) for array in arrays)])


def _by_source(items: Items, members: np.ndarray) -> np.ndarray:
    weights = items.lengths[members]
    return np.bincount(items.source[members], weights, minlength=len(items.stores)).astype(np.int64)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of every item, int64: longest first, each into the bin with the least room that still takes it.

    Johnson et al., SIAM J. Comput. 3 (1974): at most 11/9 of the optimal number of bins. Rooms are at most `capacity`
    numbers: bins are kept in a list per room, and one integer has a bit for every room that some bin has.
    """
    assert lengths.max(initial=0) <= capacity, (lengths.max(), capacity)
    capacity = min(capacity, int(lengths.sum()))  # a context may be longer than memory
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = bin_count = 0
    bins = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            rooms ^= (not by_room[room]) << room
        else:
            number, room, bin_count = bin_count, capacity, bin_count + 1
        bins[item] = number
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return bins
