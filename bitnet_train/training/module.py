"""The only LightningModule: it runs a stage, divides once, clips, steps, and logs.

A micro-batch gives sums (`StageOutput`). Their gradients add up over micro-batches and ranks, and right before the
update they are divided once, by the count of the whole global batch ("mean"), or not at all ("sum"):

    grad = sum_micro sum_rank grad(loss_sum) / (sum_micro sum_rank count  |  1)

Returned naively, Lightning would divide by the number of micro-batches and DDP would average over ranks: a mean of
means.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet_train.data.batches import PairBatch, TokenBatch
from bitnet_train.data.module import DataModule
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.optim import OptimizerConfig, set_hyperparameters
from bitnet_train.schedule import Schedule
from bitnet_train.stages.base import Stage, StageOutput

Metrics = dict[str, float]


class DivergedError(RuntimeError):
    """The gradient of a step is not finite; the weights are still those of the step before."""


class Sums:
    """Running sums of stage outputs, kept on the device until somebody asks."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, output: StageOutput, tokens: Tensor) -> None:
        """Adds one micro-batch; gradients are not kept."""
        values = {"loss": output.loss_sum, "count": output.count, "tokens": tokens, **output.metrics}
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value.detach().double()

    def reduce(self, over_ranks: Callable[[Tensor], Tensor]) -> Metrics:
        """The sums over all ranks, as numbers; what was added is forgotten."""
        names = sorted(self.values)
        reduced = over_ranks(torch.stack([self.values[name] for name in names])) if names else torch.empty(0)
        self.values = {}
        return dict(zip(names, reduced.tolist(), strict=True))


def tokens_of(batch: TokenBatch | PairBatch) -> Tensor:
    """Positions of a batch that are not padding, shape ()."""
    tokens = batch.tokens if isinstance(batch, PairBatch) else batch
    return (tokens.document_ids >= 0).sum()


class TrainingModule(L.LightningModule):
    """Trains a decoder by a stage.

    Args:
        model: the decoder; its parameters are the float32 masters.
        stage: gives the sums of a batch.
        optimizer: what builds the optimizer.
        schedule: learning rate and weight decay of every step.
        steps: optimizer steps of the whole run.
        log_every: steps between log events.

    Attributes:
        step: optimizer steps done in the run, earlier starts included.
        tokens: positions trained on so far, over all ranks, without padding.
        latest: the last train metrics that were logged.
        since_log: sums since then; part of a checkpoint.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        stage: Stage,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        steps: int,
        log_every: int,
    ) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self.optimizer_config, self.schedule = optimizer, schedule
        self.steps, self.log_every = steps, log_every
        self.step = self.tokens = 0
        self.latest: Metrics = {}
        self._micro_batches = 0
        self._this_step, self.since_log = Sums(), Sums()
        self._validation: defaultdict[int, Sums] = defaultdict(Sums)
        self._update: Metrics = {}
        self._clock = self._validation_started = time.perf_counter()

    @property
    def at_step_boundary(self) -> bool:
        """True when no gradient is being accumulated: the moment to save or stop."""
        return self._micro_batches == 0

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over the decoder's parameters."""
        return self.optimizer_config.build(self.model.named_parameters())

    def on_fit_start(self) -> None:
        """Lets the stage prepare itself on the initial model."""
        data = self._data()
        self.stage.prepare(self.model, data.row_sets, data.cache_dir, self._precision)

    def _data(self) -> DataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, DataModule)
        return data

    def _precision(self) -> AbstractContextManager[None]:
        return self.trainer.precision_plugin.forward_context()

    def _over_ranks(self, values: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(values, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def on_train_start(self) -> None:
        """Starts the clock of the throughput."""
        self._clock = time.perf_counter()

    def training_step(self, batch: TokenBatch | PairBatch, batch_idx: int) -> Tensor:
        """The sum of one micro-batch, multiplied by what Lightning and DDP are going to divide it by."""
        output = self.stage.step(self.model, batch)
        tokens = tokens_of(batch)
        self._this_step.add(output, tokens)
        self.since_log.add(output, tokens)
        self._micro_batches += 1
        return output.loss_sum * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the gradient once, refuses what is not finite, clips, and sets the step's hyperparameters."""
        sums = self._this_step.reduce(self._over_ranks)
        divisor = max(sums["count"], 1.0) if self.stage.reduction == "mean" else 1.0
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads)) / divisor
        if not math.isfinite(norm):
            raise DivergedError(
                f"step {self.step}: the gradient's norm is {norm}; the update was not made. "
                "Lower schedule.peak_lr, lengthen schedule.warmup_steps, or look at the rows of this step"
            )
        limit = self.optimizer_config.grad_clip
        clip = min(1.0, limit / norm) if limit > 0 and norm > 0 else 1.0
        torch._foreach_mul_(grads, clip / divisor)
        lr, decay = self.schedule.lr(self.step, self.steps), self.schedule.weight_decay(self.step, self.steps)
        set_hyperparameters(optimizer, lr, decay)
        self.tokens += int(sums["tokens"])
        self._update = {"train/lr": lr, "train/weight_decay": decay, "train/grad_norm": norm}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts optimizer steps and logs every `log_every` of them, and the last."""
        if self._micro_batches < self.trainer.accumulate_grad_batches:
            return
        self._micro_batches = 0
        self.step += 1
        if self.step % self.log_every == 0 or self.step == self.steps:
            self._log_training()

    def _log_training(self) -> None:
        sums = self.since_log.reduce(self._over_ranks)
        now = time.perf_counter()
        rate = sums["tokens"] / (now - self._clock)
        self._clock = now
        self.latest = {**_averages(sums, "train"), **self._update, **self._shares(), "train/tokens_per_second": rate}
        self._log(self.latest)

    def _shares(self) -> Metrics:
        """What the sources of a mixture contributed to the steps since the last log event, in tokens."""
        first = (self.step - 1) // self.log_every * self.log_every
        return {f"train/{name}": share for name, share in self._data().token_shares(first, self.step).items()}

    def on_validation_start(self) -> None:
        """Notes the time, which is not that of training."""
        self._validation_started = time.perf_counter()

    def validation_step(self, batch: TokenBatch | PairBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the sums of its validation set."""
        self._validation[dataloader_idx].add(self.stage.step(self.model, batch), tokens_of(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs every validation set as sums over the whole set, divided once."""
        metrics: Metrics = {}
        for index, name in enumerate(self._data().validation_names):
            metrics |= _averages(self._validation[index].reduce(self._over_ranks), name)
        self._log(metrics)
        self._clock += time.perf_counter() - self._validation_started

    def _log(self, metrics: Metrics) -> None:
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics({"tokens": self.tokens, **metrics}, step=self.step)


def _averages(sums: Metrics, prefix: str) -> Metrics:
    """Every metric as its sum over the count."""
    count = max(sums.pop("count"), 1.0)
    sums.pop("tokens")
    return {f"{prefix}/{name}": value / count for name, value in sums.items()}
