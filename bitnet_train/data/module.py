"""The LightningDataModule: rows in the order of `data.order`, and named validation sets."""

from collections.abc import Callable, Sequence, Sized
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from bitnet_train.data.config import ChatData, DataConfig, PreferenceData, Rows, Source, TextData, sources_of
from bitnet_train.data.order import BlockOrder, MicroBatches, ValidationBatches, sample_at
from bitnet_train.data.streaming import StreamedRows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError

__all__ = [
    "ChatData",
    "DataModule",
    "PreferenceData",
    "Rows",
    "TextData",
]  # `_target_`s of conf/data and what they make

_REPETITIONS = 1000  # of every row in one step; small data sets are read a few times


class DataModule(L.LightningDataModule):
    """Serves training rows in the order of `data.order`, and validation rows in their own.

    Args:
        config: one of the data configurations above.
        tokenizer: what turns text into ids.
        seed: of the order.
        global_batch_size: rows per optimizer step over all ranks.
        micro_batch_size: rows per forward pass.

    Attributes:
        row_sets: "train", and "val" or one "val/NAME" per named validation set.

    Raises:
        UserError: the sizes do not divide, a path holds nothing, a row is wrong, or a step is far larger than the data.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, seed: int, global_batch_size: int, micro_batch_size: int
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        if config.train is None:
            raise UserError("data.train is not set; give a path, a glob or a hub id: data.train=rows.jsonl")
        self.row_sets: dict[str, Rows] = {"train": config.training_rows(tokenizer)}
        for name, entry in config.validation_sets().items():
            self.row_sets[name] = config.rows(entry, tokenizer, f"data.{name.replace('/', '.')}")
        _check_repetitions(global_batch_size, len(self.row_sets["train"]))
        self.steps = self.first_step = 0

    @property
    def cache_dir(self) -> Path:
        """Where results that outlive the run are kept."""
        return self.config.cache_path

    @property
    def validation_names(self) -> list[str]:
        """The names of the validation sets in the order of their loaders: "val", or "val/NAME" of each."""
        return [name for name in self.row_sets if name != "train"]

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
        rows = self.row_sets["train"]
        count = len(rows)
        order = MicroBatches(count, self.seed, self.global_batch_size, self.micro_batch_size, self.steps, rank, ranks)
        order.first_step, order.lengths = self.first_step, self.config.sort_lengths(rows)
        order.sample_at = self._sample_at
        return order

    @cached_property
    def _sample_at(self) -> Callable[[int], int]:
        rows = self.row_sets["train"]
        if isinstance(rows, StreamedRows):
            return BlockOrder(rows.rows_by_block(), self.global_batch_size, self.seed)
        return partial(sample_at, count=len(rows), seed=self.seed)

    def token_shares(self, first_step: int, last_step: int) -> dict[str, float]:
        """The share of each source in the tokens of steps [first_step, last_step), over all ranks; {} without mixture.

        A pure function of the order: no batch carries its sources, and a resumed run logs the same.
        """
        sources = sources_of(self.config.train, "data.train")
        if len(sources) < 2:
            return {}
        rows, order = self.row_sets["train"], self.micro_batches(rank=0, ranks=1)
        tokens = sum(rows.tokens_by_source(row) for step in range(first_step, last_step) for row in order.samples(step))
        shares = (tokens / np.sum(tokens)).tolist()
        return {f"share/{name}": share for name, share in zip(_short_names(sources), shares, strict=True)}

    def train_dataloader(self) -> DataLoader[Any]:
        """The rest of the run's micro-batches for this rank."""
        assert self.trainer is not None
        rows, order = self.row_sets["train"], self.micro_batches(self.trainer.global_rank, self.trainer.world_size)
        if isinstance(rows, StreamedRows):
            rows.keep(self.global_batch_size // self.trainer.world_size)
        return self._loader(rows, batch_sampler=order)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each of `validation_names`: all rows in order, over all ranks."""
        return [
            self._loader(self.row_sets[name], batch_sampler=self.validation_batches(name))
            for name in self.validation_names
        ]

    def validation_batches(self, name: str) -> ValidationBatches:
        """What this rank reads of a validation set."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return ValidationBatches(len(self.row_sets[name]), self.micro_batch_size, rank, ranks)

    def _loader(self, rows: Rows, **how: Any) -> DataLoader[Any]:
        collate: Callable[[Sequence[Any]], Any] = rows.collate
        assert isinstance(rows, Sized)
        return DataLoader(rows, collate_fn=collate, num_workers=self.config.num_workers, **how)  # type: ignore[arg-type]


def _check_repetitions(global_batch_size: int, rows: int) -> None:
    if global_batch_size > _REPETITIONS * rows:
        raise UserError(
            f"global_batch_size must be at most {_REPETITIONS} times the {rows} rows of data.train, got "
            f"{global_batch_size}: a step reads each row as often, for the gradient that reading it once has"
        )


def _short_names(sources: Sequence[Source]) -> list[str]:
    """The file names, or the whole paths where file names repeat."""
    names = [Path(source.name).name for source in sources]
    return names if len(set(names)) == len(names) else [source.name for source in sources]
