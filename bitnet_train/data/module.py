"""From paths to batches: the data configurations (text, chat, preference) and the LightningDataModule over them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import lightning as L
from torch.utils.data import DataLoader

from bitnet_train.data.chat import encode_chat, encode_pair
from bitnet_train.data.order import MicroBatches
from bitnet_train.data.packing import PackedRows, PairRows, StreamRows
from bitnet_train.data.preference import pair_of
from bitnet_train.data.sources import Row, located, messages_of, read_rows, text_of
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError

Item = TypeVar("Item", bound=Sized)
LONG_ROWS = ("drop", "truncate", "error")
_ENCODE_AT_ONCE = 1024  # documents per call of the tokenizer, which spreads them over the cores


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


@dataclass(frozen=True)
class _Data(ABC):
    """What every kind of data is configured by.

    Attributes:
        train: files, globs, folders or hub ids, or a list of {path, weight}; required to train.
        val: the same for validation; null validates nothing.
        tokenizer: a folder with tokenizer.json; null takes the one that comes with init_from.
        sequence_length: positions per row, in tokens.
        num_workers: processes that make batches beside the training process.
        cache_dir: where results that outlive a run are kept, such as DPO's reference.
    """

    sequence_length: int
    train: Any = None
    val: Any = None
    tokenizer: str | None = None
    num_workers: int = 0
    cache_dir: str = "~/.cache/bitnet_train"

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"data.num_workers must be at least 0, got {self.num_workers}")
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length must be at least 2, got {self.sequence_length}")

    def rows(self, sources: Any, tokenizer: Tokenizer) -> Rows:
        """Reads, tokenizes and arranges the sources: paths, or a list of {path, weight} mixed by token share."""
        named = [_named(source) for source in sources] if isinstance(sources, list) else [_named(sources)]
        if not any(weight for _, weight in named):
            return self._arrange(self._read([path for path, _ in named], tokenizer), tokenizer)
        groups = [self._read([path], tokenizer) for path, _ in named]
        return self._arrange(mix(groups, [weight or 1.0 for _, weight in named]), tokenizer)

    @abstractmethod
    def _read(self, paths: list[str], tokenizer: Tokenizer) -> list[Any]:
        """The tokenized items of the paths; len(item) is its number of tokens."""

    @abstractmethod
    def _arrange(self, items: list[Any], tokenizer: Tokenizer) -> Rows:
        """Items to rows."""


def _named(source: Any) -> tuple[str, float | None]:
    """Path and weight of an entry of data.train or data.val."""
    if isinstance(source, str):
        return source, None
    weight = source.get("weight") if isinstance(source, dict) else None
    if set(source) != {"path", "weight"} or not isinstance(weight, int | float) or not weight > 0:
        raise UserError(f"data: an entry must be a path or {{path: ..., weight: above 0}}, got {source}")
    return str(source["path"]), float(weight)


def mix(groups: Sequence[Sequence[Item]], weights: Sequence[float]) -> list[Item]:
    """Items of several sources, so that source i holds weight_i / sum(weights) of the TOKENS.

    The source that is repeated least is taken once; the others as often as their share asks for, the last time in part.
    A share of rows would be another one wherever rows differ in length.
    """
    sizes = [sum(map(len, group)) for group in groups]
    least = min(weight / size for weight, size in zip(weights, sizes, strict=True))
    mixed: list[Item] = []
    for group, weight, size in zip(groups, weights, sizes, strict=True):
        whole, part = divmod(weight / size / least, 1.0)
        mixed += list(group) * int(whole)
        ends = accumulate(map(len, group))
        mixed += [item for item, end in zip(group, ends, strict=True) if end <= part * size]
    return mixed


@dataclass(frozen=True)
class TextData(_Data):
    """Documents for pre-training: `text` of every row, joined to a stream and cut every sequence_length tokens."""

    def _read(self, paths: list[str], tokenizer: Tokenizer) -> list[list[int]]:
        return [
            [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            for texts in _batched(map(text_of, read_rows(paths)))
            for ids in tokenizer.encode_batch(texts)
            if ids
        ]

    def _arrange(self, items: list[list[int]], tokenizer: Tokenizer) -> StreamRows:
        if not items:
            raise UserError("data: every text is empty; give documents with text")
        return StreamRows(items, self.sequence_length, tokenizer.pad_token_id)


@dataclass(frozen=True)
class _LongRows(_Data):
    """Rows that are kept whole need a rule for those that do not fit: drop, truncate (at the end) or error."""

    long_rows: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_rows not in LONG_ROWS:
            raise UserError(f"data.long_rows must be one of {', '.join(LONG_ROWS)}, got {self.long_rows!r}")


class Conversation(NamedTuple):
    """Token ids, and for each whether it is trained."""

    ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ChatData(_LongRows):
    """Conversations for SFT, packed to rows, loss on what the assistant says (`train_on`: assistant, last or all)."""

    train_on: str = "assistant"

    def _read(self, paths: list[str], tokenizer: Tokenizer) -> list[Conversation]:
        fitting = _Fitting(self.sequence_length + 1, self.long_rows)
        chats = []
        for row in read_rows(paths):
            with located(row):
                chat = encode_chat(messages_of(row), tokenizer, self.train_on)
            kept = fitting.length(row, len(chat.input_ids))
            if any(chat.trained[1:kept]):
                chats.append(Conversation(chat.input_ids[:kept], chat.trained[:kept]))
        fitting.report(paths, len(chats))
        return chats

    def _arrange(self, items: list[Conversation], tokenizer: Tokenizer) -> PackedRows:
        ids, trained = [chat.ids for chat in items], [chat.trained for chat in items]
        return PackedRows(ids, trained, self.sequence_length, tokenizer.pad_token_id)


class _EncodedPair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PreferenceData(_LongRows):
    """Pairs of completions of one prompt for DPO."""

    def _read(self, paths: list[str], tokenizer: Tokenizer) -> list[_EncodedPair]:
        fitting = _Fitting(self.sequence_length + 1, self.long_rows)
        pairs = []
        for row in read_rows(paths):
            with located(row):
                prompt, chosen, rejected = encode_pair(pair_of(row), tokenizer)
            room = fitting.length(row, len(prompt) + max(len(chosen), len(rejected))) - len(prompt)
            if room > 0:
                pairs.append(_EncodedPair(prompt, chosen[:room], rejected[:room]))
        fitting.report(paths, len(pairs))
        return pairs

    def _arrange(self, items: list[_EncodedPair], tokenizer: Tokenizer) -> PairRows:
        prompts, chosen, rejected = ([pair[i] for pair in items] for i in range(3))
        return PairRows(prompts, chosen, rejected, tokenizer.pad_token_id)


class _Fitting:
    """Applies the rule for rows longer than `capacity` ids, and says in one line what it cost."""

    def __init__(self, capacity: int, rule: str) -> None:
        self.capacity, self.rule = capacity, rule
        self.seen = self.long = self.lost = 0

    def length(self, row: Row, length: int) -> int:
        """How many ids of a row of this length are kept."""
        self.seen += 1
        if length <= self.capacity:
            return length
        if self.rule == "error":
            raise UserError(
                f"{row.where}: the row has {length} tokens, data.sequence_length allows {self.capacity}; raise it, or "
                "set data.long_rows to drop or truncate"
            )
        kept = self.capacity if self.rule == "truncate" else 0
        self.long, self.lost = self.long + 1, self.lost + length - kept
        return kept

    def report(self, paths: list[str], left: int) -> None:
        """One line if anything was lost; an error if nothing is left."""
        verb = "truncated" if self.rule == "truncate" else "dropped"
        line = f"data: {', '.join(paths)}: {self.long} of {self.seen} rows {verb}, {self.lost} tokens lost"
        if not left:
            raise UserError(f"{line}: no row is left to train on; raise data.sequence_length above {self.capacity - 1}")
        if self.long:
            print(line, file=sys.stderr, flush=True)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _ENCODE_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class DataModule(L.LightningDataModule):
    """Serves training rows in the order of `data.order`, and validation rows in their own.

    Args:
        config: one of the data configurations above.
        tokenizer: what turns text into ids.
        seed: of the order.
        global_batch_size: rows per optimizer step over all ranks.
        micro_batch_size: rows per forward pass.

    Raises:
        UserError: the sizes do not divide, a path holds nothing, or a row is wrong.
    """

    def __init__(
        self, config: _Data, tokenizer: Tokenizer, seed: int, global_batch_size: int, micro_batch_size: int
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        if config.train is None:
            raise UserError("data.train is not set; give a path, a glob or a hub id: data.train=rows.jsonl")
        self.row_sets: dict[str, Rows] = {"train": config.rows(config.train, tokenizer)}
        if config.val is not None:
            self.row_sets["val"] = config.rows(config.val, tokenizer)
        self.steps = self.first_step = 0

    @property
    def cache_dir(self) -> Path:
        """Where results that outlive the run are kept."""
        return Path(self.config.cache_dir).expanduser()

    def steps_per_epoch(self) -> float:
        """Optimizer steps that read every training row once."""
        return len(self.row_sets["train"]) / self.global_batch_size

    def micro_batches(self, rank: int, ranks: int) -> MicroBatches:
        """The order in which a rank reads; `steps` and `first_step` bound it."""
        per_pass = self.micro_batch_size * ranks
        if self.global_batch_size % per_pass:
            raise UserError(
                f"global_batch_size must be a multiple of micro_batch_size times the number of ranks "
                f"({self.micro_batch_size} x {ranks}), got {self.global_batch_size}"
            )
        count = len(self.row_sets["train"])
        order = MicroBatches(count, self.seed, self.global_batch_size, self.micro_batch_size, self.steps, rank, ranks)
        order.first_step = self.first_step
        return order

    def train_dataloader(self) -> DataLoader[Any]:
        """The rest of the run's micro-batches for this rank."""
        assert self.trainer is not None
        order = self.micro_batches(self.trainer.global_rank, self.trainer.world_size)
        return self._loader(self.row_sets["train"], batch_sampler=order)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All validation rows in order, or nothing."""
        if "val" not in self.row_sets:
            return []
        return self._loader(self.row_sets["val"], batch_size=self.micro_batch_size)

    def _loader(self, rows: Rows, **how: Any) -> DataLoader[Any]:
        collate: Callable[[Sequence[Any]], Any] = rows.collate
        assert isinstance(rows, Sized)
        return DataLoader(rows, collate_fn=collate, num_workers=self.config.num_workers, **how)  # type: ignore[arg-type]
