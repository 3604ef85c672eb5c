"""A run, from its configuration to the folder of its result.

start       weights and tokenizer (init_from, or fresh), data, stage
resume      the newest checkpoint of the run directory, if there is one
fit         Lightning's loop over `TrainingModule`
result      run_dir/model, an HF folder of master weights; status.json says how it ended
"""

import fcntl
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bitnet_train import config as configuration
from bitnet_train.config import RunConfig
from bitnet_train.data.module import DataModule, PreferenceData
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.memory import keep_freed_memory
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import SpecialIds, save_pretrained, source_folder
from bitnet_train.model.start import start_from, starting_config
from bitnet_train.optim import ByTarget, OptimizerConfig
from bitnet_train.stages.base import Stage
from bitnet_train.stages.dpo import DirectPreference
from bitnet_train.training import checkpoint
from bitnet_train.training.callbacks import Checkpointing, ProgressReport, StopRequested, stop_on_signals
from bitnet_train.training.card import model_card
from bitnet_train.training.loggers import JsonlLogger, finish_wandb, forget_after
from bitnet_train.training.module import TrainingModule

log = logging.getLogger(__name__)

PRECISIONS = ("bf16-mixed", "32-true")  # bfloat16 masters swallow their updates, float16 overflows in relu^2
_BYTES_PER_PARAMETER = 4 + 4 + 8  # float32 master, its gradient, the two moments of Adam


@dataclass
class Parts:
    """What a run is made of."""

    settings: RunConfig
    run_dir: Path
    tokenizer: Tokenizer
    data: DataModule
    module: TrainingModule

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        config = self.module.model.config.to_json()
        return {
            "model": json.dumps(config, sort_keys=True),
            "stage": type(self.module.stage).__name__,
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.settings.seed,
            "global_batch_size": self.settings.global_batch_size,
            "data.sequence_length": self.data.config.sequence_length,
            "rows of data.train": len(self.data.row_sets["train"]),
            "steps": self.module.steps,
            "data.train": self.data.row_sets["train"].fingerprint,
            "optimizer": repr(self.module.optimizer_config),
            "schedule": repr(self.module.schedule),
            "stage's settings": repr(self.module.stage),
            "quantization_warmup_steps": self.module.warmup_steps,
        }


def run(settings: RunConfig, config: DictConfig) -> None:
    """Trains as configured and leaves the result in run_dir/model.

    Raises:
        UserError: the configuration or the data is wrong.
        StopRequested: the run was asked to stop; its state is saved.
    """
    _quiet_lightning()
    keep_freed_memory()
    with stop_on_signals():
        _run(settings, config, Path(HydraConfig.get().runtime.output_dir))


def _run(settings: RunConfig, config: DictConfig, run_dir: Path) -> None:
    parts = _build(settings, config, run_dir)
    with _lock(run_dir):
        state = _resume(parts)
        trainer = _trainer(parts, config, state)
        _print_plan(parts)
        if not settings.dry_run:
            _train(parts, trainer, state)


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Two runs in one directory would overwrite each other; the operating system frees the lock of one that dies."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"run_dir={run_dir}: another run is at work there; wait for it or use another") from None
        yield


def _train(parts: Parts, trainer: L.Trainer, state: dict[str, Any] | None) -> None:
    run_dir = parts.run_dir
    write_status(run_dir, "running", parts.module.step)
    try:
        _fit(parts, trainer, state)
        _save_result(parts)
    except StopRequested as stop:
        write_status(run_dir, "requeue", parts.module.step, str(stop))
        raise
    except BaseException as error:
        write_status(run_dir, "failed", parts.module.step, f"{type(error).__name__}: {error}")
        raise
    finally:
        finish_wandb()
    write_status(run_dir, "done", parts.module.step)


def write_status(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """status.json: running, done, requeue or failed."""
    temporary = run_dir / ".status.json.tmp"
    temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason}))
    temporary.replace(run_dir / "status.json")


def _build(settings: RunConfig, config: DictConfig, run_dir: Path) -> Parts:
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    model, tokenizer = _start(settings.init_from, config.data.tokenizer, config, run_dir)
    if config.data.sequence_length is None:
        config.data.sequence_length = model.config.max_position_embeddings
    data_config = configuration.build(config.data, "data")
    _check_sizes(model.config, data_config.sequence_length, tokenizer)
    stage = configuration.build(config.stage, "stage")
    _check_stage(stage, data_config)
    optimizer = _optimizer(config.optimizer)
    schedule = configuration.build(config.schedule, "schedule")
    schedule = schedule.in_steps(settings.global_batch_size * data_config.sequence_length)
    data = DataModule(data_config, tokenizer, settings.seed, settings.global_batch_size, settings.micro_batch_size)
    data.steps = total_steps(settings, data)
    intervals = (settings.log_every, settings.health_every, settings.quantization_warmup_steps)
    module = TrainingModule(model, stage, optimizer, schedule, tokenizer, data.steps, *intervals)
    return Parts(settings, run_dir, tokenizer, data, module)


def _start(
    init_from: str | None, tokenizer: str | None, config: DictConfig, run_dir: Path
) -> tuple[BitNetForCausalLM, Tokenizer]:
    """Weights and tokenizer: those of init_from, or fresh weights and the tokenizer of data.tokenizer."""
    if init_from is not None:
        folder = source_folder(init_from, "init_from")
        model, report = start_from(folder, _varied(starting_config(folder), config.model))
        log.info("%s", report)
        with atomic_file(run_dir / "init_from.txt") as temporary:
            temporary.write_text(f"{report}\n", encoding="utf-8")
        return model, Tokenizer.from_folder(Path(tokenizer) if tokenizer else folder)
    if tokenizer is None:
        raise UserError(
            "data.tokenizer is not set; give a folder with tokenizer.json, or start from weights: init_from=DIR"
        )
    if "_target_" not in config.model:
        raise UserError("model=inherit takes the model of init_from, which is not set; choose another model=")
    return BitNetForCausalLM(configuration.build(config.model, "model")), Tokenizer.from_folder(Path(tokenizer))


def _optimizer(node: DictConfig) -> OptimizerConfig:
    """A configuration of `bitnet_train.optim`, or any optimizer that `_target_` names, with the node's other keys."""
    target = str(node.get("_target_"))
    if target.startswith(OptimizerConfig.__module__):
        optimizer = configuration.build(node, "optimizer")
        assert isinstance(optimizer, OptimizerConfig)
        return optimizer
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    own = {field.name: values.pop(field.name) for field in fields(OptimizerConfig) if field.name in values}
    options = {str(key): value for key, value in values.items() if key != "_target_"}
    return ByTarget(target=target, options=options, **own)


def _varied(config: BitNetConfig, node: DictConfig) -> BitNetConfig:
    """The configuration that comes with init_from, with the fields set under model=inherit in place of its own."""
    if "_target_" in node:
        return config
    values: dict[Any, Any] = {"_target_": f"{BitNetConfig.__module__}.{BitNetConfig.__name__}", **asdict(config)}
    values |= {name: value for name, value in node.items() if value is not None}
    varied = configuration.build(OmegaConf.create(values), "model")
    assert isinstance(varied, BitNetConfig)
    return varied


def _check_stage(stage: Stage, data_config: Any) -> None:
    if isinstance(stage, DirectPreference) != isinstance(data_config, PreferenceData):
        raise UserError(
            f"stage {type(stage).__name__} does not read {type(data_config).__name__}; "
            "pretrain and sft take data=text or data=chat, dpo takes data=preference"
        )


def _check_sizes(model: BitNetConfig, sequence_length: int, tokenizer: Tokenizer) -> None:
    if sequence_length > model.max_position_embeddings:
        raise UserError(
            f"data.sequence_length must be at most the model's max_position_embeddings "
            f"({model.max_position_embeddings}), got {sequence_length}"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size must be at least the tokenizer's ({tokenizer.vocab_size}), got {model.vocab_size}"
        )


def total_steps(settings: RunConfig, data: DataModule) -> int:
    """The first of the ends that are set, in optimizer steps; at least one."""
    tokens_per_step = settings.global_batch_size * data.config.sequence_length
    ends: list[float] = []
    if settings.max_steps is not None:
        ends.append(settings.max_steps)
    if settings.max_tokens is not None:
        ends.append(settings.max_tokens / tokens_per_step)
    if settings.max_epochs is not None:
        ends.append(settings.max_epochs * data.steps_per_epoch())
    return max(1, int(min(ends)))


def _print_plan(parts: Parts) -> None:
    model, settings = parts.module.model, parts.settings
    parameters = sum(p.numel() for p in model.parameters())
    tokens = settings.global_batch_size * parts.data.config.sequence_length
    log.info(
        "%s: %s parameters, %d rows, %d steps of %d rows (up to %s tokens), %.2f epochs; "
        "weights, gradients and optimizer take %.2f GB",
        settings.recipe_name,
        f"{parameters:,}",
        len(parts.data.row_sets["train"]),
        parts.module.steps,
        settings.global_batch_size,
        f"{tokens:,}",
        parts.module.steps / parts.data.steps_per_epoch(),
        parameters * _BYTES_PER_PARAMETER / 1e9,
    )


def _resume(parts: Parts) -> dict[str, Any] | None:
    """The state to go on from, if there is one; step and position are set already."""
    found = checkpoint.find(parts.run_dir / "checkpoints", parts.settings.resume)
    if found is None:
        return None
    state = checkpoint.load(found, parts.identity)
    parts.module.step, parts.module.tokens = state["step"], state["tokens"]
    parts.data.first_step = parts.module.step
    log.info("resuming from %s", found)
    return state


def _fit(parts: Parts, trainer: L.Trainer, state: dict[str, Any] | None) -> None:
    """Trains what is left. The last checkpoint comes after the last validation: found again, nothing is missing."""
    module, data, settings = parts.module, parts.data, parts.settings
    folder = parts.run_dir / "checkpoints"
    checkpoint.set_aside_after(folder, module.step if state else -1)
    forget_after(parts.run_dir / "metrics.jsonl", module.step if state else -1)
    if state is not None and module.step == module.steps:
        module.model.load_state_dict(state["model"])
        return
    trainer.fit(module, datamodule=data)
    last = _training_state(parts)
    if module.step % settings.val_every:
        trainer.validate(module, datamodule=data, verbose=False)
    checkpoint.save(folder, module.step, last, settings.keep_last)


def _trainer(parts: Parts, config: DictConfig, state: dict[str, Any] | None) -> L.Trainer:
    settings, folder = parts.settings, parts.run_dir / "checkpoints"

    def save() -> None:
        checkpoint.save(folder, parts.module.step, _training_state(parts), settings.keep_last)
        write_status(parts.run_dir, "running", parts.module.step)

    callbacks = [
        _Restore(state),
        Checkpointing(parts.run_dir, settings.checkpoint_every, save),
        ProgressReport(log.info),
        *instantiate(config.callbacks).values(),
    ]
    loggers = [JsonlLogger(parts.run_dir / "metrics.jsonl"), *instantiate(config.logger).values()]
    trainer: L.Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        max_steps=parts.module.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0 if state else -1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=parts.run_dir,
    )
    if trainer.world_size > 1:
        raise UserError(f"trainer.devices times trainer.num_nodes must be 1 in this version, got {trainer.world_size}")
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision must be {' or '.join(PRECISIONS)} (float32 masters), got {trainer.precision}"
        )
    per_step = parts.data.micro_batches(trainer.global_rank, trainer.world_size).per_step
    trainer.accumulate_grad_batches = per_step
    configuration.build(config.execution, "execution").apply(parts.module.model, per_step)
    trainer.val_check_interval = settings.val_every * per_step
    _count_as_done(trainer, parts.module.step, per_step)
    return trainer


def _count_as_done(trainer: L.Trainer, step: int, per_step: int) -> None:
    """Starts Lightning's totals at `step`, so that max_steps and the rhythm of validation count the whole run."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.total.ready = step * per_step
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def _training_state(parts: Parts) -> dict[str, Any]:
    module = parts.module
    return {
        "identity": parts.identity,
        "step": module.step,
        "tokens": module.tokens,
        "model": module.model.state_dict(),
        "optimizer": module.trainer.optimizers[0].state_dict(),
        "rng": checkpoint.rng_state(),
        "since_log": module.since_log.values,
        "health": module.health.codes,
    }


class _Restore(L.Callback):
    """Puts a checkpoint's weights, optimizer and RNG in place when the loop is about to start."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self.state = state

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.state is None:
            return
        assert isinstance(pl_module, TrainingModule)
        pl_module.model.load_state_dict(self.state["model"])
        trainer.optimizers[0].load_state_dict(self.state["optimizer"])
        for values, saved in ((pl_module.since_log.values, "since_log"), (pl_module.health.codes, "health")):
            values.update({name: value.to(pl_module.device) for name, value in self.state[saved].items()})
        checkpoint.set_rng_state(self.state["rng"])
        self.state = None


def _save_result(parts: Parts) -> None:
    metrics = (parts.run_dir / "metrics.jsonl").read_text().splitlines()
    card = model_card(parts.settings.recipe_name, parts.module.model.config, [json.loads(line) for line in metrics])
    tokenizer = parts.tokenizer
    special = SpecialIds(tokenizer.bos_token_id, tokenizer.stop_token_ids, tokenizer.pad_token_id)
    save_pretrained(parts.run_dir / "model", parts.module.model, special, tokenizer.save, card)
    log.info("done: %s", parts.run_dir / "model")


def _quiet_lightning() -> None:
    """Leaves out Lightning's banners and its advice on loaders, which does not fit ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
