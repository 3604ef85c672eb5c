"""What a run is made of, built from its configuration: weights, tokenizer, data, stage, optimizer, schedule."""

import json
import logging
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from bitnet_train import config as configuration
from bitnet_train.config import RunConfig
from bitnet_train.data.module import DataModule, PreferenceData
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.metrics import METRICS
from bitnet_train.memory import machine_bytes
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import source_folder
from bitnet_train.model.skeleton import own_rows
from bitnet_train.model.start import start_from, starting_config
from bitnet_train.optim import ByTarget, OptimizerConfig
from bitnet_train.stages.base import Stage
from bitnet_train.stages.dpo import DirectPreference
from bitnet_train.training import out_of_memory, ranks
from bitnet_train.training.loggers import JsonlLogger
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.sharding import share

log = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 4 + 4  # float32 master and its gradient; the optimizer says what it adds


@dataclass
class Parts:
    """What a run is made of."""

    settings: RunConfig
    run_dir: Path
    tokenizer: Tokenizer
    data: DataModule
    module: TrainingModule
    metrics: JsonlLogger

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it, by the name of the setting."""
        module, data, rows = self.module, self.data, self.data.row_sets["train"]
        optimizer = module.optimizer_config
        return {
            "model": json.dumps(module.model.config.to_json(), sort_keys=True),
            "tokenizer": self.tokenizer.fingerprint,
            "optimizer": repr(replace(optimizer, grad_clip=0.0)),
            "optimizer.grad_clip": optimizer.grad_clip,
            "stage": repr(module.stage),
            "schedule": repr(module.schedule),
            "max_steps": module.steps,
            "seed": self.settings.seed,
            "global_batch_size": self.settings.global_batch_size,
            "data.train": f"{len(rows)} samples ({rows.fingerprint})",
            "data.sequence_length": data.config.sequence_length,
            "quantization_warmup_steps": module.warmup_steps,
        }


def build(settings: RunConfig, config: DictConfig, run_dir: Path) -> Parts:
    """The parts of a run. Every rank builds the same; what a rank draws later is its own.

    Raises:
        UserError: the configuration or the data is wrong.
        RunFailed: there is no memory for the model.
    """
    seed_everything(settings.seed)
    with out_of_memory.explained(out_of_memory.building), _built_for(config.trainer):
        model, tokenizer = _start(settings.init_from, config.data.tokenizer, config, run_dir)
    if config.data.sequence_length is None:
        config.data.sequence_length = model.config.max_position_embeddings
    data_config = configuration.build(config.data, "data")
    _check_sizes(model.config, data_config.sequence_length, tokenizer)
    _check_pass(settings.micro_batch_size, data_config.sequence_length, model.config.hidden_size)
    stage = configuration.build(config.stage, "stage")
    _check_stage(stage, data_config)
    optimizer = _optimizer(config.optimizer)
    schedule = configuration.build(config.schedule, "schedule")
    schedule = schedule.in_steps(settings.global_batch_size * data_config.sequence_length)
    if settings.keep_best and data_config.val is None:
        raise UserError("keep_best keeps the checkpoints of lowest val/loss; set data.val, or keep_best=0")
    data = DataModule(data_config, tokenizer, settings.seed, settings.global_batch_size, settings.micro_batch_size)
    data.steps = total_steps(settings, data)
    counts = (settings.log_every, settings.health_every, settings.quantization_warmup_steps, settings.skip_nonfinite)
    module = TrainingModule(model, stage, optimizer, schedule, tokenizer, data.steps, *counts)
    if not ranks.is_first():  # the weights are the same on every rank, dropout is not
        seed_everything(settings.seed + ranks.rank())
    return Parts(settings, run_dir, tokenizer, data, module, JsonlLogger(run_dir / METRICS))


def _built_for(trainer: DictConfig) -> AbstractContextManager[object]:
    """Where weights are going to be sharded, no rank holds more than its rows of them and one whole matrix."""
    if trainer.get("strategy") != "fsdp" or ranks.count() == 1:
        return nullcontext()
    return own_rows(partial(share, rank=ranks.rank(), count=ranks.count()))


def seed_everything(seed: int) -> None:
    """Starts the generators of Python, NumPy and torch from a seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _start(
    init_from: str | None, tokenizer: str | None, config: DictConfig, run_dir: Path
) -> tuple[BitNetForCausalLM, Tokenizer]:
    """Weights and tokenizer: those of init_from, or fresh weights and the tokenizer of data.tokenizer."""
    if init_from is not None:
        folder = source_folder(init_from, "init_from")
        model, report = start_from(folder, _varied(starting_config(folder), config.model))
        log.info("%s", report)
        if ranks.is_first():
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
            f"model.vocab_size must be at least the tokenizer's ({tokenizer.vocab_size}), got {model.vocab_size}; set "
            f"model.vocab_size={tokenizer.vocab_size} (what init_from lacks is drawn anew), or take the tokenizer that "
            "the model was trained with"
        )


def _check_pass(rows: int, length: int, hidden_size: int) -> None:
    """A forward pass has one hidden state of every position at least, in bfloat16."""
    there = max(machine_bytes(), torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)
    needed = 2 * rows * length * hidden_size
    if needed > there:
        raise UserError(
            f"micro_batch_size={rows} rows of data.sequence_length={length} positions take at least "
            f"{needed / 1e9:,.0f} GB in a forward pass, this machine has {there / 1e9:,.0f} GB; lower either"
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


def print_plan(parts: Parts) -> None:
    """One line: what is going to be trained, for how long, and what it takes."""
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
        parameters * (_BYTES_PER_PARAMETER + parts.module.optimizer_config.moment_bytes) / 1e9,
    )
