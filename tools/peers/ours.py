"""bitnet_train by its own command; `+callbacks.clock._target_=peers.ours.ReadClock` is all that is added to it."""

from typing import Any

import lightning as L
from torch import Tensor

from bitnet_train.data.batches import TokenBatch
from bitnet_train.training.module import TrainingModule, tokens_of
from peers.clock import Clock


def predicting(batch: TokenBatch) -> int:
    """Positions whose next token belongs to the same document, and is no padding."""
    documents: Tensor = batch.document_ids
    joins = (documents[:, 1:] != documents[:, :-1]) & (documents[:, 1:] >= 0)
    return int((documents >= 0).sum() - joins.sum())


class ReadClock(L.Callback):
    """Tells the clock of every micro-batch and of every update."""

    def __init__(self, folder: str, task: str, every: int) -> None:
        self.clock = Clock(folder, task, every)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step ends with the last of its micro-batches."""
        assert isinstance(pl_module, TrainingModule)
        self.clock.count(predicting(tokens_of(batch)))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.clock.step_ended(pl_module.model)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything was measured."""
        self.clock.finish()
