"""The only LightningModule: it runs a stage, divides once, clips, steps, and logs.

A micro-batch gives sums (`StageOutput`). Their gradients add up over micro-batches and ranks, and right before the
update they are divided once, by the count of the whole global batch ("mean"), or not at all ("sum"):

    grad = sum_micro sum_rank grad(loss_sum) / (sum_micro sum_rank count  |  1)

Returned naively, Lightning would divide by the number of micro-batches and DDP would average over ranks: a mean of
means.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet_train.data.batches import PairBatch, TokenBatch, label_bytes
from bitnet_train.data.module import DataModule
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.model.bitlinear import forget_codes, set_strength
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.optim import OptimizerConfig, set_hyperparameters
from bitnet_train.schedule import Schedule
from bitnet_train.stages.base import Mean, Ranks, Stage, StageOutput
from bitnet_train.training import ranks
from bitnet_train.training.guard import StepGuard
from bitnet_train.training.health import TernaryHealth
from bitnet_train.training.low_bit import gather_codes, refresh_scales
from bitnet_train.training.sharding import is_sharded, own_part, shard, whole
from bitnet_train.training.throughput import Throughput

Metrics = dict[str, float]
P = ParamSpec("P")
T = TypeVar("T")


class Sums:
    """Running sums of stage outputs, kept on the device until somebody asks.

    `values` holds float64 `(2,)` per name: the total and its weight.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, **means: Mean) -> None:
        """Adds the figures of one micro-batch; gradients are not kept."""
        for name, (total, weight) in means.items():
            value = torch.stack((total.detach().double(), weight.detach().double()))
            self.values[name] = self.values.get(name, 0) + value

    def reduce(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Total and weight over all ranks, as numbers; what was added is forgotten."""
        names = sorted(self.values)
        reduced = over_ranks(torch.stack([self.values[name] for name in names])).tolist() if names else []
        self.values = {}
        return {name: (total, weight) for name, (total, weight) in zip(names, reduced, strict=True)}


def tokens_of(batch: TokenBatch | PairBatch) -> TokenBatch:
    """The tokens of a batch of either kind."""
    return batch.tokens if isinstance(batch, PairBatch) else batch


def means_of(output: StageOutput, batch: TokenBatch | PairBatch) -> dict[str, Mean]:
    """What is summed up of a micro-batch: loss, metrics, and `tokens`, the positions that are not padding."""
    tokens = (tokens_of(batch).document_ids >= 0).sum()
    means = {"loss": Mean(output.loss_sum, output.count), "tokens": Mean(tokens, torch.ones_like(tokens))}
    return {**means, **output.metrics}


class TrainingModule(L.LightningModule):
    """Trains a decoder by a stage.

    Args:
        model: the decoder; its parameters are the float32 masters.
        stage: gives the sums of a batch.
        optimizer: what builds the optimizer.
        schedule: learning rate and weight decay of every step.
        tokenizer: says how many bytes a token stands for.
        steps: optimizer steps of the whole run.
        log_every: steps between log events.
        health_every: steps between measurements of the ternary weights; 0 takes none.
        warmup_steps: steps over which quantisation sets in, see `model.bitlinear.set_strength`; 0 starts with it.
        skip_nonfinite: steps in a row without a finite loss and gradient that are left out; see `StepGuard`.

    Attributes:
        low_bit_gather: whether sharded weights travel as codes, see `training.low_bit`.
        step: optimizer steps done in the run, earlier starts included.
        tokens: positions trained on so far, over all ranks, without padding.
        latest: the last train metrics that were logged.
        since_log: sums since then; part of a checkpoint.
        guard: keeps updates from being made of what is not finite; part of a checkpoint.
        validated: the step of the last validation, and its loss.
        batch_shape: rows and positions of the last micro-batch.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        stage: Stage,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        tokenizer: Tokenizer,
        steps: int,
        log_every: int = 10,
        health_every: int = 0,
        warmup_steps: int = 0,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self.optimizer_config, self.schedule = optimizer, schedule
        self.tokenizer = tokenizer
        self.steps, self.log_every, self.warmup_steps = steps, log_every, warmup_steps
        self.step = self.tokens = 0
        self.low_bit_gather = False
        self.latest: Metrics = {}
        self.health, self._throughput = TernaryHealth(health_every), Throughput()
        self.guard = StepGuard(skip_nonfinite)
        self.validated: tuple[int, float] | None = None
        self.batch_shape: tuple[int, int] | None = None
        self._micro_batches = 0
        self._this_step, self.since_log = Sums(), Sums()
        self._before_step: dict[str, Tensor] = {}
        self._validation: dict[str, Sums] = defaultdict(Sums)
        self._update: Metrics = {}
        lengths = torch.tensor([tokenizer.byte_lengths, tokenizer.first_byte_lengths], dtype=torch.int64)
        self.register_buffer("_byte_lengths", lengths, persistent=False)

    @property
    def at_step_boundary(self) -> bool:
        """True when no gradient is being accumulated: the moment to save or stop."""
        return self._micro_batches == 0

    def configure_model(self) -> None:
        """Shards the decoder where the strategy has a mesh for it; a second call changes nothing."""
        if self.device_mesh is not None and not is_sharded(self):
            shard(self, self.model, self.device_mesh["data_parallel"], ("training_step", "validation_step", "gathered"))
            if self.low_bit_gather:
                gather_codes(self.model.model.layers)
                refresh_scales(self.model)

    def gathered(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """function(*args, **kwargs), which runs the decoder outside of the steps; sharded ranks call it together."""
        return function(*args, **kwargs)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over the decoder's parameters."""
        optimizer = self.optimizer_config.build(self.model.named_parameters())
        optimizer.register_step_post_hook(lambda *_: self._weights_changed())
        return optimizer

    def setup(self, stage: str) -> None:
        """Reads the data for as many steps as the run has, and accumulates over the micro-batches of a step."""
        if stage == "fit":
            data = self._data()
            data.steps = self.steps
            per_step = data.micro_batches(self.trainer.global_rank, self.trainer.world_size).per_step
            self.trainer.accumulate_grad_batches = per_step

    def _weights_changed(self) -> None:
        """What was made of the weights is of other weights now."""
        forget_codes(self.model)
        if self.low_bit_gather:
            refresh_scales(self.model)

    def on_fit_start(self) -> None:
        """Lets the stage prepare itself on the initial model."""
        data = self._data()
        group = Ranks(ranks.rank(), ranks.count(), self._over_ranks, whole, self.gathered)
        self.stage.prepare(self.model, data.row_sets, data.cache_dir, self._precision, group)

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
        """Starts the clock, and takes the codes that flips are counted from; weights may come from a checkpoint."""
        self._weights_changed()
        self.health.start(self.model)
        self._throughput.restart()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch has just come from the loader."""
        rows, length = tokens_of(batch).input_ids.shape
        self.batch_shape = (rows, length)
        if self.trainer.training:
            self._throughput.batch_arrived(length)
        return batch

    @property
    def strength(self) -> float:
        """lambda of the present step, x + lambda (q(x) - x): from 0 to 1 in `warmup_steps` steps."""
        return min(1.0, self.step / self.warmup_steps) if self.warmup_steps else 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the strength of quantisation, which is 1 outside of training."""
        set_strength(self.model, self.strength)
        if self.at_step_boundary:
            self._before_step = dict(self.since_log.values)

    def training_step(self, batch: TokenBatch | PairBatch, batch_idx: int) -> Tensor:
        """The sum of one micro-batch, multiplied by what Lightning and DDP are going to divide it by."""
        output = self.stage.step(self.model, batch)
        means = means_of(output, batch)
        self._this_step.add(loss=means["loss"], tokens=means["tokens"])
        self.since_log.add(**means)
        self.guard.saw(output.loss_sum)
        self._micro_batches += 1
        return output.loss_sum * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the gradient once, leaves out what is not finite, clips, and sets the step's hyperparameters."""
        sums = self._this_step.reduce(self._over_ranks)
        count = max(sums["loss"][1], 1.0)
        divisor = count if self.stage.reduction == "mean" else 1.0
        grads = [own_part(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = self._norm(grads) / divisor
        order = self._data().micro_batches(ranks.rank(), ranks.count())
        if not self.guard.passes(self.step, norm, sums["loss"][0], order):
            optimizer.zero_grad()  # without gradients it changes nothing
            self.since_log.values = self._before_step
            return
        torch._foreach_mul_(grads, self._clip(norm, count) / divisor)
        lr, decay = self.schedule.lr(self.step, self.steps), self.schedule.weight_decay(self.step, self.steps)
        set_hyperparameters(optimizer, lr, decay)
        self.tokens += int(sums["tokens"][0])
        self._update = {"train/lr": lr, "train/weight_decay": decay, "train/grad_norm": norm}
        if self.warmup_steps:
            self._update["train/quantization_strength"] = self.strength

    def _norm(self, grads: list[Tensor]) -> float:
        """Of the whole gradient: over shards, the squares of their norms add up."""
        norm = nn.utils.get_total_norm(grads).double()
        return float(self._over_ranks(norm.square()).sqrt() if is_sharded(self) else norm)

    def _clip(self, norm: float, count: float) -> float:
        """What the gradient is multiplied by so that its norm is at most the limit."""
        limit = self.optimizer_config.grad_clip
        if self.optimizer_config.grad_clip_per_token and self.stage.reduction == "sum":
            limit *= count
        return min(1.0, limit / norm) if limit > 0 and norm > 0 else 1.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts optimizer steps and logs every `log_every` of them, and the last."""
        if self._micro_batches == self.trainer.accumulate_grad_batches:
            self._micro_batches = 0
            self.step += 1
            self._log_training(tokens_of(batch))
        self._throughput.batch_asked_for()

    def _log_training(self, batch: TokenBatch) -> None:
        """What is due after this step, as one event; `batch` is its last micro-batch."""
        metrics: Metrics = {}
        due = self.step % self.log_every == 0 or self.step == self.steps
        if due and self.guard.limit:
            metrics["train/skipped_steps"] = self.guard.skipped[1]
        if due and self.since_log.values:  # not every step was left out
            sums = self.since_log.reduce(self._over_ranks)
            rates = self._throughput.read(sums.pop("tokens")[0], self.model, self.trainer.world_size)
            metrics |= {**_averages(sums, "train"), **self._update, **self._shares(), **_named("train", rates)}
            self.latest = metrics
        if self.health.is_due(self.step):
            with self._precision():
                metrics = {**metrics, **self.gathered(self.health.measure, self.model, batch)}
        if metrics:
            self.log_event(metrics)

    def _shares(self) -> Metrics:
        """What the sources of a mixture contributed to the steps since the last log event, in tokens."""
        first = (self.step - 1) // self.log_every * self.log_every
        return {f"train/{name}": share for name, share in self._data().token_shares(first, self.step).items()}

    def on_train_end(self) -> None:
        """Leaves the model as it is exported."""
        set_strength(self.model, 1.0)

    def on_validation_start(self) -> None:
        """The time of validation is not that of training; what is validated is what would be exported."""
        set_strength(self.model, 1.0)
        self._throughput.pause()

    def validation_step(self, batch: TokenBatch | PairBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the sums of its validation set, unless it only fills up the last round of the ranks."""
        output = self.stage.step(self.model, batch)
        means = means_of(output, batch)
        if isinstance(batch, TokenBatch):
            means["bits_per_byte"] = Mean(output.loss_sum / math.log(2), self._bytes(batch))
        name = self._data().validation_names[dataloader_idx]
        if not self._data().validation_batches(name).counts(batch_idx):
            means = {metric: Mean(*map(torch.zeros_like, mean)) for metric, mean in means.items()}
        self._validation[name].add(**means)

    def _bytes(self, batch: TokenBatch) -> Tensor:
        """Bytes of text that the labels of a batch stand for, shape ()."""
        lengths: Tensor = self._byte_lengths  # type: ignore[assignment]
        return label_bytes(batch, lengths, self.tokenizer.bos_token_id)

    def on_validation_epoch_end(self) -> None:
        """Logs validation as sums over each whole set, divided once."""
        metrics: Metrics = {}
        for name in self._data().validation_names:
            averages = _averages(self._validation[name].reduce(self._over_ranks), name)
            if f"{name}/bits_per_byte" in averages:
                averages[f"{name}/perplexity"] = math.exp(min(averages[f"{name}/loss"], 700.0))
            metrics |= averages
        self._validation.clear()
        losses = [metrics[f"{name}/loss"] for name in self._data().validation_names]
        if losses:
            self.validated = (self.step, sum(losses) / len(losses))
        self.log_event(metrics)
        self._throughput.go_on()

    def log_event(self, metrics: Metrics) -> None:
        """Writes metrics of this step to every logger."""
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics({"tokens": self.tokens, **metrics}, step=self.step)


def _named(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _averages(sums: dict[str, tuple[float, float]], prefix: str) -> Metrics:
    """Every metric as its total over its weight."""
    sums.pop("tokens", None)
    return _named(prefix, {name: total / max(weight, 1.0) for name, (total, weight) in sums.items()})
