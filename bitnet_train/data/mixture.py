"""Which sequences a run reads: of one source or of several by token share, long ones dropped, cut or refused.

    source i holds weight_i / sum(weights) of the TOKENS

The source that is repeated least is taken once; the others as often as their share asks for, the last time in part: its
beginning. A share of rows would be another one wherever rows differ in length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bitnet_train.data.store import Counts, TokenStore, trained_of
from bitnet_train.errors import UserError

LONG_ROWS = ("drop", "truncate", "error")


class Documents(Protocol):
    """Documents joined to one stream of tokens: a `TokenStore`, or a `streaming.TokenStream`."""

    @property
    def size(self) -> int:
        """Tokens of all documents."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the documents."""
        ...

    @property
    def counts(self) -> Counts:
        """What they were made of."""
        ...

    def piece(self, begin: int, end: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end), uint32, and where within them documents end, int64, in (0, end - begin]."""
        ...

    def last_end(self, limit: float, /) -> int:
        """Where the last document ends that lies within the first `limit` tokens; 0 if none does."""
        ...


def joined(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents one behind the other, as `Documents.piece` gives them."""
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in pieces[:-1])])
    ends = [ends + offset for (_, ends), offset in zip(pieces, offsets, strict=True)]
    return np.concatenate([tokens for tokens, _ in pieces]), np.concatenate(ends)


class Span(NamedTuple):
    """The first `tokens` tokens of a store, which end with a document; `source` is the number of the store."""

    store: Documents
    source: int
    tokens: int


@dataclass(frozen=True)
class Items:
    """Conversations (`width` 1) or preference pairs (`width` 2 sequences) of several stores.

    Attributes:
        stores: one per source.
        source: int64 `(items,)`, the number of the store.
        number: int64 `(items,)`, the number of the item within its store.
        lengths: int64 `(items,)`, tokens of all its sequences, each cut to `capacity`.
        width: sequences per item.
        capacity: tokens kept of a sequence.
    """

    stores: Sequence[TokenStore]
    source: np.ndarray
    number: np.ndarray
    lengths: np.ndarray
    width: int
    capacity: int

    def __len__(self) -> int:
        return len(self.number)

    @property
    def dropped(self) -> int:
        """Items of the stores that are not among these."""
        return sum(len(store) // self.width - len(kept) for store, kept in self._kept())

    @property
    def truncated(self) -> int:
        """Items of which a sequence is cut, each counted once."""
        longest = (store.lengths().reshape(-1, self.width).max(axis=1)[kept] for store, kept in self._kept())
        return sum(int((lengths > self.capacity).sum()) for lengths in longest)

    def _kept(self) -> list[tuple[TokenStore, np.ndarray]]:
        """Every store with the numbers of its items among these, once each."""
        return [(store, np.unique(self.number[self.source == source])) for source, store in enumerate(self.stores)]

    def sequence(self, item: int, which: int = 0) -> np.ndarray:
        """One of the item's sequences, uint32 `(length,)`."""
        store = self.stores[self.source[item]]
        sequence: np.ndarray = store[self.number[item] * self.width + which][: self.capacity]
        return sequence


class Fitting(NamedTuple):
    """The items of a store that are kept, with their lengths, and what the others cost."""

    number: np.ndarray
    lengths: np.ndarray
    long: int
    lost_tokens: int


def fit(store: TokenStore, width: int, capacity: int, rule: str) -> Fitting:
    """Applies the rule for sequences of more than `capacity` tokens; what is cut must still hold a trained token.

    Raises:
        UserError: there is one and the rule is "error".
    """
    lengths = store.lengths().reshape(-1, width)
    longest = lengths.max(axis=1, initial=0)
    long = np.flatnonzero(longest > capacity)
    if rule == "error" and len(long):
        raise UserError(
            f"the row has {longest[long[0]]} tokens, data.sequence_length allows {capacity}; raise it, or "
            "set data.long_rows to drop or truncate"
        )
    dropped = [item for item in long.tolist() if rule == "drop" or not _is_trained(store, item, width, capacity)]
    kept = np.delete(np.arange(len(lengths)), dropped)
    lost = int(longest[long].sum()) - capacity * (len(long) - len(dropped))
    return Fitting(kept, np.minimum(lengths[kept], capacity).sum(axis=1), len(long), lost)


def first_long(store: TokenStore, capacity: int) -> int:
    """The number of the source's row that first has a sequence of more than `capacity` tokens."""
    return int(store.rows[np.argmax(store.lengths() > capacity)])


def _is_trained(store: TokenStore, item: int, width: int, capacity: int) -> bool:
    """Whether every sequence of the item, cut to capacity, has a token to predict."""
    sequences = (store[item * width + which] for which in range(width))
    return all(trained_of(sequence[1:capacity]).any() for sequence in sequences)


def mixed_spans(stores: Sequence[Documents], weights: Sequence[float]) -> list[Span]:
    """Whole documents of every store, by token share."""
    spans = []
    for source, (store, times) in enumerate(zip(stores, _repetitions([s.size for s in stores], weights), strict=True)):
        whole, part = times
        spans += [Span(store, source, store.size)] * whole
        end = store.last_end(part * store.size)
        spans += [Span(store, source, end)] if end else []
    return spans


def mixed_items(
    stores: Sequence[TokenStore], fittings: Sequence[Fitting], weights: Sequence[float], width: int, capacity: int
) -> Items:
    """Whole items of every store, by token share."""
    sizes = [int(fitting.lengths.sum()) for fitting in fittings]
    chosen = [
        np.concatenate([np.tile(np.arange(len(fitting.number)), whole), _beginning(fitting.lengths, part * size)])
        for fitting, size, (whole, part) in zip(fittings, sizes, _repetitions(sizes, weights), strict=True)
    ]
    return Items(
        stores,
        np.repeat(np.arange(len(stores)), [len(items) for items in chosen]),
        np.concatenate([fitting.number[items] for fitting, items in zip(fittings, chosen, strict=True)]),
        np.concatenate([fitting.lengths[items] for fitting, items in zip(fittings, chosen, strict=True)]),
        width,
        capacity,
    )


def _beginning(lengths: np.ndarray, tokens: float) -> np.ndarray:
    """The first items that together have at most so many tokens."""
    return np.arange(np.searchsorted(np.cumsum(lengths), tokens, side="right"))


def _repetitions(sizes: Sequence[int], weights: Sequence[float]) -> list[tuple[int, float]]:
    """How often each source is taken, in whole and in part, sizes in tokens."""
    least = min(weight / size for weight, size in zip(weights, sizes, strict=True))
    times = [divmod(weight / size / least, 1.0) for weight, size in zip(weights, sizes, strict=True)]
    return [(int(whole), part) for whole, part in times]
