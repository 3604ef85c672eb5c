"""Lightning's Trainer for a run: the loggers and callbacks of its configuration, and its own counts."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

from bitnet_train import config as configuration
from bitnet_train.errors import UserError
from bitnet_train.model.execution import Execution
from bitnet_train.optim import AdamW8bit
from bitnet_train.training import objects, ranks, sharding
from bitnet_train.training.callbacks import Checkpointing, ProgressReport
from bitnet_train.training.loggers import make_loggers
from bitnet_train.training.parts import Parts

log = logging.getLogger(__name__)

# What the run decides itself, and what to set instead. Other options of lightning.Trainer do what Lightning says:
# accelerator, devices, num_nodes, strategy, precision, plugins, limit_val_batches, deterministic, benchmark,
# inference_mode, profiler, detect_anomaly, sync_batchnorm, enable_autolog_hparams. After max_time the run stops as on
# request, with its state saved: `Checkpointing`.
_OWN = {
    "max_steps": "max_steps",
    "max_epochs": "max_epochs",
    "min_steps": "max_steps, max_tokens or max_epochs",
    "min_epochs": "max_steps, max_tokens or max_epochs",
    "limit_train_batches": "max_steps",
    "overfit_batches": "data.train with few rows",
    "fast_dev_run": "max_steps, or dry_run=true",
    "limit_test_batches": "tools/evaluate.py",
    "limit_predict_batches": "tools/generate.py",
    "accumulate_grad_batches": "global_batch_size and micro_batch_size",
    "gradient_clip_val": "optimizer.grad_clip",
    "gradient_clip_algorithm": "optimizer.grad_clip",
    "val_check_interval": "val_every",
    "check_val_every_n_epoch": "val_every",
    "num_sanity_val_steps": "val_every",
    "log_every_n_steps": "log_every",
    "logger": "the group logger=",
    "callbacks": "the group callbacks=",
    "enable_checkpointing": "checkpoint_every and keep_last",
    "model_registry": "tools/export.py --push-to-hub",
    "enable_progress_bar": "log_every; there is a bar on a terminal alone",
    "enable_model_summary": "dry_run=true",
    "barebones": "log_every, val_every and checkpoint_every",
    "use_distributed_sampler": "seed, which alone orders the rows",
    "reload_dataloaders_every_n_epochs": "seed, which alone orders the rows",
    "default_root_dir": "run_dir",
}

PRECISIONS = ("bf16-mixed", "32-true")  # bfloat16 masters swallow their updates, float16 overflows in relu^2


def make_trainer(
    parts: Parts, config: DictConfig, callbacks: Sequence[L.Callback], save: Callable[[], str]
) -> L.Trainer:
    """The Trainer, with gradient accumulation and the options of execution set.

    Args:
        parts: what is trained.
        config: the run's configuration: trainer, callbacks, logger, execution.
        callbacks: what has to come before the saving of checkpoints.
        save: saves the state of the run, see `Checkpointing`.

    Raises:
        UserError: the number of devices is not that of the ranks, the precision is not for training, or a callback, a
            logger or the Trainer is no class of that kind.
    """
    settings = parts.settings
    every = [
        *callbacks,
        Checkpointing(parts.run_dir, settings.checkpoint_every, save, _max_time(config.trainer)),
        ProgressReport(log.info),
        *objects.named(config.callbacks, "callbacks", L.Callback),
    ]
    trainer = objects.trainer(
        config.trainer,
        callbacks=every,
        logger=[parts.metrics, *make_loggers(config, parts.run_dir, is_resumed=parts.module.step > 0)],
        max_steps=parts.module.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0 if parts.module.step else -1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=parts.run_dir,
        max_time=None,
        **_distribution(config.trainer),
    )
    _check(trainer)
    _set_rhythm(trainer, parts, config)
    return trainer


def check_options(node: DictConfig) -> None:
    """Before anything is built.

    Raises:
        UserError: an option is set that the run decides itself, or max_time is no time.
    """
    for name, instead in _OWN.items():
        if name in node:
            raise UserError(f"trainer.{name} is set by the run itself; leave it out, and use {instead}")
    _max_time(node)


def _max_time(node: DictConfig) -> float:
    """Seconds; infinite where there is no limit."""
    given = node.get("max_time")
    try:
        seconds = Timer(dict(given) if isinstance(given, DictConfig) else given).time_remaining()
    except (MisconfigurationException, TypeError, ValueError, OverflowError, AttributeError):
        seconds = 0
    if seconds is not None and seconds <= 0:
        raise UserError(f"trainer.max_time must be DD:HH:MM:SS or {{minutes: N}}, and above 0, got {given}")
    return math.inf if seconds is None else seconds


def _distribution(node: DictConfig) -> dict[str, object]:
    """The launcher's description of the ranks, and DDP where several ranks have no other strategy.

    A decoder has no buffers that ranks would have to agree on, and every parameter has a gradient. A single process has
    nothing to share out.
    """
    environment, strategy = ranks.environment(), node.get("strategy", "auto")
    if environment is None:
        return {"strategy": "auto"} if strategy == "fsdp" else {}
    if node.get("plugins") is not None:
        raise UserError("trainer.plugins is set by the run itself where there are several ranks; leave it out")
    if strategy == "fsdp":  # inference tensors cannot be gathered into again
        return {"plugins": [environment], "strategy": sharding.strategy(), "inference_mode": False}
    if strategy in ("auto", "ddp"):
        return {
            "plugins": [environment],
            "strategy": DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True),
        }
    return {"plugins": [environment]}


def _check(trainer: L.Trainer) -> None:
    if trainer.world_size != ranks.count():
        raise UserError(
            f"trainer.devices times trainer.num_nodes is {trainer.world_size}, but {ranks.count()} "
            f"{'process was' if ranks.count() == 1 else 'processes were'} started; let both be the same"
        )
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision must be {' or '.join(PRECISIONS)} (float32 masters), got {trainer.precision}"
        )


def _set_rhythm(trainer: L.Trainer, parts: Parts, config: DictConfig) -> None:
    """Gradient accumulation, and what depends on it."""
    per_step = parts.data.micro_batches(ranks.rank(), ranks.count()).per_step
    trainer.accumulate_grad_batches = per_step
    trainer.val_check_interval = parts.settings.val_every * per_step
    execution: Execution = configuration.build(config.execution, "execution")
    execution.apply(parts.module.model, per_step)
    parts.module.low_bit_gather = execution.low_bit_gather
    _check_sharding(execution, parts, config)
    _count_as_done(trainer, parts.module.step, per_step)


def _check_sharding(execution: Execution, parts: Parts, config: DictConfig) -> None:
    """What does not go together with shards, or only with them."""
    is_sharded = config.trainer.get("strategy") == "fsdp"
    if is_sharded and isinstance(parts.module.optimizer_config, AdamW8bit):
        raise UserError("optimizer=adamw_8bit writes into whole weights, trainer=fsdp shards them; use optimizer=adamw")
    if execution.low_bit_gather and not is_sharded:
        raise UserError("execution.low_bit_gather=true is for sharded weights; add trainer=fsdp, or leave it out")
    if execution.low_bit_gather and parts.module.warmup_steps:
        raise UserError(
            f"execution.low_bit_gather=true moves codes alone, quantization_warmup_steps={parts.module.warmup_steps} "
            "needs the weights as well; set either to its default"
        )


def _count_as_done(trainer: L.Trainer, step: int, per_step: int) -> None:
    """Starts Lightning's totals at `step`, so that max_steps and the rhythm of validation count the whole run."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.total.ready = step * per_step
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def quiet_lightning() -> None:
    """Leaves out Lightning's banners and its advice on loaders, which does not fit ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
