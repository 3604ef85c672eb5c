"""The data configurations, one per kind (text, chat, preference): from paths to rows.

paths -> `sources_of` -> `cache.tokenized` (or `streaming.TokenStream`) -> `mixture` -> `packing`
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bitnet_train.data.cache import BAD_ROWS, nth_row, report, tokenized
from bitnet_train.data.chat import TRAIN_ON
from bitnet_train.data.encoding import ChatEncoder, Encoder, PairEncoder, TextEncoder
from bitnet_train.data.mixture import LONG_ROWS, Fitting, Items, first_long, fit, mixed_items, mixed_spans
from bitnet_train.data.packing import PackedRows, PairRows, StreamRows
from bitnet_train.data.store import TokenStore
from bitnet_train.data.streaming import StreamedRows, TokenStream
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.data.workers import available_cores
from bitnet_train.errors import UserError, printable
from bitnet_train.memory import machine_bytes
from bitnet_train.user_cache import user_cache

_BYTES_PER_PROCESS = 10 << 20  # that a worker forked from a trainer has for itself: 10.2 MB (2026-11-27, torch 2.13)


class Rows(Protocol):
    """Rows of token ids that a loader can index, and the function that makes a batch of them."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the rows hold."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def collate(self, rows: Any, /) -> Any:
        """A batch of what `__getitem__` gave."""
        ...

    def tokens_by_source(self, index: int, /) -> np.ndarray:
        """Tokens of each source in a row, int64 `(sources,)`."""
        ...


class Source(NamedTuple):
    """Paths that are read together, and their weight in a mixture; `name` is how metrics call it."""

    name: str
    paths: list[str]
    weight: float


def sources_of(entry: Any, field: str) -> list[Source]:
    """The sources of a path, a list of paths (one source), or a list of {path, weight} (one source each).

    Raises:
        UserError: something else; it names the field.
    """
    entries = entry if isinstance(entry, list) else [entry]
    named = [_path_and_weight(one, field) for one in entries]
    if not any(weight for _, weight in named):
        paths = [path for path, _ in named]
        return [Source(", ".join(paths), paths, 1.0)]
    return [Source(path, [path], weight or 1.0) for path, weight in named]


def _path_and_weight(entry: Any, field: str) -> tuple[str, float | None]:
    if isinstance(entry, str):
        return entry, None
    weight = entry.get("weight") if isinstance(entry, dict) and set(entry) == {"path", "weight"} else None
    if not isinstance(weight, int | float) or not weight > 0:
        raise UserError(f"{field}: an entry must be a path or {{path: ..., weight: above 0}}, got {entry}")
    return str(entry["path"]), float(weight)


def _check_processes(field: str, count: int) -> None:
    most = machine_bytes() // _BYTES_PER_PROCESS
    if count > most:
        raise UserError(
            f"{field} must be at most {most} on this machine, got {count}: each process takes "
            f"{_BYTES_PER_PROCESS >> 20} MB at least; more of them than cores ({available_cores()}) wait for each other"
        )


@dataclass(frozen=True)
class DataConfig(ABC):
    """What every kind of data is configured by.

    Attributes:
        train: files, globs, folders or hub ids, or a list of {path, weight}; required to train.
        val: the same for validation, or {name: the same} for several sets with a figure each; null validates nothing.
        tokenizer: a folder with tokenizer.json; null takes the one that comes with init_from.
        sequence_length: positions per row, in tokens.
        bad_rows: "error", or "skip" to leave out rows that are no data, count and report them.
        num_workers: processes that make batches beside the training process.
        num_proc: processes that tokenize; null: one per core where the files are large.
        cache_dir: where tokens and other results that outlive a run are kept; null: bitnet_train in the user's cache.
    """

    sequence_length: int
    train: Any = None
    val: Any = None
    tokenizer: str | None = None
    bad_rows: str = "error"
    num_workers: int = 0
    num_proc: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"data.num_workers must be at least 0, got {self.num_workers}")
        if self.num_proc is not None and self.num_proc < 1:
            raise UserError(f"data.num_proc must be at least 1, or null, got {self.num_proc}")
        for name in ("num_workers", "num_proc"):
            _check_processes(f"data.{name}", getattr(self, name) or 0)
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length must be at least 2, got {self.sequence_length}")
        if self.bad_rows not in BAD_ROWS:
            raise UserError(f"data.bad_rows must be {' or '.join(BAD_ROWS)}, got {self.bad_rows!r}")

    @property
    def cache_path(self) -> Path:
        """The folder of the cache."""
        return user_cache() if self.cache_dir is None else Path(self.cache_dir).expanduser()

    def rows(self, entry: Any, tokenizer: Tokenizer, field: str = "data.train") -> Rows:
        """Reads, tokenizes and arranges what `sources_of` finds in the entry."""
        sources = sources_of(entry, field)
        encoder = self._encoder(tokenizer)
        stores = [self._store(source, encoder) for source in sources]
        return self._arrange(sources, stores, tokenizer.pad_token_id)

    def training_rows(self, tokenizer: Tokenizer) -> Rows:
        """`rows` of `train`."""
        return self.rows(self.train, tokenizer)

    def _store(self, source: Source, encoder: Encoder) -> TokenStore:
        store = tokenized(source.paths, encoder, self.cache_path, self.num_proc, self.bad_rows)
        _check_size(source, store.size)
        return store

    def validation_sets(self) -> dict[str, Any]:
        """The entries of `val` by the names of their metrics: "val", or "val/NAME" of each."""
        if self.val is None:
            return {}
        if not isinstance(self.val, Mapping):
            return {"val": self.val}
        return {f"val/{name}": entry for name, entry in self.val.items()}

    def sort_lengths(self, rows: Rows) -> np.ndarray | None:
        """By what the rows of an optimizer step are sorted, see `MicroBatches.lengths`."""
        return None

    @abstractmethod
    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        """What makes token ids of rows."""

    @abstractmethod
    def _arrange(self, sources: Sequence[Source], stores: Sequence[TokenStore], pad_id: int) -> Rows:
        """Sequences of every source to rows."""


def _check_size(source: Source, tokens: int) -> None:
    if not tokens:
        raise UserError(f"data: {source.name}: every row is empty or bad; give rows with text")


@dataclass(frozen=True)
class TextData(DataConfig):
    """Documents for pre-training: `text` of every row, joined to a stream and cut every sequence_length tokens.

    Attributes:
        streaming: no token cache of train: its tokens are counted once, and made anew whenever they are read.
    """

    streaming: bool = False

    def training_rows(self, tokenizer: Tokenizer) -> Rows:
        """See `DataConfig.training_rows`."""
        if not self.streaming:
            return super().training_rows(tokenizer)
        sources, encoder = sources_of(self.train, "data.train"), self._encoder(tokenizer)
        streams = [self._stream(source, encoder) for source in sources]
        spans = mixed_spans(streams, [source.weight for source in sources])
        return StreamedRows(streams, spans, self.sequence_length, tokenizer.pad_token_id)

    def _stream(self, source: Source, encoder: Encoder) -> TokenStream:
        stream = TokenStream(source.paths, encoder, self.cache_path, self.num_proc, self.bad_rows)
        report(source.paths, stream.counts, self.bad_rows)
        _check_size(source, stream.size)
        return stream

    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        return TextEncoder(tokenizer)

    def _arrange(self, sources: Sequence[Source], stores: Sequence[TokenStore], pad_id: int) -> StreamRows:
        spans = mixed_spans(stores, [source.weight for source in sources])
        return StreamRows(spans, self.sequence_length, pad_id)


@dataclass(frozen=True)
class _LongRows(DataConfig):
    """Rows that are kept whole need a rule for those that do not fit.

    Attributes:
        long_rows: what becomes of rows longer than sequence_length: drop, truncate (at the end) or error.
    """

    long_rows: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_rows not in LONG_ROWS:
            raise UserError(f"data.long_rows must be one of {', '.join(LONG_ROWS)}, got {self.long_rows!r}")

    def _items(self, sources: Sequence[Source], stores: Sequence[TokenStore], width: int) -> Items:
        """What fits of every source, mixed."""
        fittings = [self._fit(source, store, width) for source, store in zip(sources, stores, strict=True)]
        weights = [source.weight for source in sources]
        return mixed_items(stores, fittings, weights, width, self.sequence_length + 1)

    def _fit(self, source: Source, store: TokenStore, width: int) -> Fitting:
        """Says in one line what the rule for long rows cost."""
        capacity = self.sequence_length + 1
        try:
            fitting = fit(store, width, capacity, self.long_rows)
        except UserError as error:
            where = nth_row(source.paths, first_long(store, capacity))
            raise UserError(f"{where}: {error}") from None
        verb = "truncated" if self.long_rows == "truncate" else "dropped"
        line = (
            f"data: {source.name}: {fitting.long} of {len(store) // width} rows {verb}, "
            f"{fitting.lost_tokens} tokens lost"
        )
        if not len(fitting.number):
            raise UserError(f"{line}: no row is left to train on; raise data.sequence_length above {capacity - 1}")
        if fitting.long:
            print(printable(line), file=sys.stderr, flush=True)
        return fitting


@dataclass(frozen=True)
class ChatData(_LongRows):
    """Conversations for SFT, packed to rows.

    Attributes:
        train_on: assistant: every answer carries loss; last: the last answer; all: everything.
    """

    train_on: str = "assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise UserError(f"data.train_on must be one of {', '.join(TRAIN_ON)}, got {self.train_on!r}")

    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        return ChatEncoder(tokenizer, self.train_on)

    def _arrange(self, sources: Sequence[Source], stores: Sequence[TokenStore], pad_id: int) -> PackedRows:
        return PackedRows(self._items(sources, stores, width=1), self.sequence_length, pad_id)


@dataclass(frozen=True)
class PreferenceData(_LongRows):
    """Pairs of completions of one prompt for DPO.

    Attributes:
        group_by_length: sorts the pairs within every optimizer step: less padding, the same gradient.
    """

    group_by_length: bool = True

    def sort_lengths(self, rows: Rows) -> np.ndarray | None:
        """See `DataConfig.sort_lengths`."""
        return rows.lengths if self.group_by_length and isinstance(rows, PairRows) else None

    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        return PairEncoder(tokenizer)

    def _arrange(self, sources: Sequence[Source], stores: Sequence[TokenStore], pad_id: int) -> PairRows:
        return PairRows(self._items(sources, stores, width=2), pad_id)
