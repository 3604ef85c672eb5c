"""Faults that tests inject into a run in their own process, as callbacks of its configuration."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """Bounds a resource of this process, one of resource.RLIMIT_..., while the block runs."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


class FullDisk(L.Callback):
    """From one step to another, no file of a rank grows beyond `limit` bytes: no checkpoint fits, a line does."""

    def __init__(self, first: int, last: int, rank: int = 0, limit: int = 100_000) -> None:
        self.first, self.last, self.rank, self.limit = first, last, rank, limit

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Comes before the module counts the step."""
        assert isinstance(pl_module, TrainingModule)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if pl_module.step + 1 == self.first and ranks.rank() == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, hard))
        if pl_module.step + 1 == self.last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class NotANumber(L.Callback):
    """On one rank, the last hidden states of every micro-batch of a step are no numbers."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.step == self.step and ranks.rank() == self.rank:
            pl_module.model.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))


class _AfterStep(L.Callback):
    """Acts on the run at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Comes before the module counts the step."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.step + 1 == self.step:
            self.act(trainer)

    def act(self, trainer: L.Trainer) -> None:
        """Once per micro-batch of the step."""
        raise NotImplementedError


class Vanish(_AfterStep):
    """Removes the run directory after a step."""

    def act(self, trainer: L.Trainer) -> None:
        shutil.rmtree(Path(trainer.default_root_dir), ignore_errors=True)


class Terminate(_AfterStep):
    """Sends SIGTERM to the run after a step, as a cluster does."""

    def act(self, trainer: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
