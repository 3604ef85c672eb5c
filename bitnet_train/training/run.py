"""A run, from its configuration to the folder of its result.

start       the ranks meet and compare what they were started with; weights, data and stage are built (`parts`)
resume      the newest checkpoint of the run directory, if there is one
fit         Lightning's loop over `TrainingModule`
result      run_dir/model, an HF folder of master weights; status.json says how it ended
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import lightning as L
from omegaconf import DictConfig, OmegaConf

from bitnet_train.config import RunConfig
from bitnet_train.errors import UserError
from bitnet_train.memory import keep_freed_memory
from bitnet_train.model.pretrained import SpecialIds, save_pretrained
from bitnet_train.training import checkpoint, ranks
from bitnet_train.training.card import model_card
from bitnet_train.training.loggers import finish_wandb, forget_after
from bitnet_train.training.parts import Parts, build, print_plan
from bitnet_train.training.signals import StopRequested, ignore_signals, stop_on_signals
from bitnet_train.training.state import Restore, State, collect
from bitnet_train.training.status import write_status
from bitnet_train.training.trainer import make_trainer, quiet_lightning

log = logging.getLogger(__name__)


def run(settings: RunConfig, config: DictConfig, run_dir: Path) -> None:
    """Trains as configured and leaves the result in run_dir/model. Every rank calls it.

    Raises:
        UserError: the configuration or the data is wrong.
        StopRequested: the run was asked to stop; its state is saved.
    """
    quiet_lightning()
    keep_freed_memory()
    with stop_on_signals(), ranks.joined(settings.rank_timeout):
        if not ranks.is_first():
            logging.getLogger("bitnet_train").setLevel(logging.WARNING)
        ranks.check_same("run_dir", str(run_dir.resolve()))
        ranks.check_same("the configuration", _digest(config))
        with _lock(run_dir):
            _run(build(settings, config, run_dir), config)


def _digest(config: DictConfig) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(config, resolve=True).encode()).hexdigest()[:16]


def _run(parts: Parts, config: DictConfig) -> None:
    state = _resume(parts)
    trainer = make_trainer(parts, config, [Restore(state, parts.settings.seed)], lambda: _save(parts))
    print_plan(parts)
    if not parts.settings.dry_run:
        _train(parts, trainer, state)


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Two runs in one directory would overwrite each other; the operating system frees the lock of one that dies."""
    with (run_dir / ".lock").open("w") as file:
        ranks.on_first(lambda: _take(file, run_dir))
        yield


def _take(file: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"run_dir={run_dir}: another run is at work there; wait for it or use another") from None


def _train(parts: Parts, trainer: L.Trainer, state: State | None) -> None:
    run_dir = parts.run_dir
    _report(run_dir, "running", parts.module.step)
    try:
        _fit(parts, trainer, state)
        _save_result(parts)
    except StopRequested as stop:
        ignore_signals()
        _report(run_dir, "requeue", parts.module.step, str(stop))
        raise
    except BaseException as error:
        _report(run_dir, "failed", parts.module.step, f"{type(error).__name__}: {error}")
        raise
    finally:
        finish_wandb()
    _report(run_dir, "done", parts.module.step)


def _report(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """The first rank writes status.json."""
    if ranks.is_first():
        write_status(run_dir, state, step, reason)


def _resume(parts: Parts) -> State | None:
    """The state to go on from, if there is one; step and position are set already."""
    found = ranks.on_first(lambda: checkpoint.find(parts.run_dir / "checkpoints", parts.settings.resume))
    if found is None:
        return None
    state = checkpoint.load(found, parts.identity)
    parts.module.step, parts.module.tokens = state["step"], state["tokens"]
    parts.data.first_step = parts.module.step
    log.info("resuming from %s", found)
    return state


def _fit(parts: Parts, trainer: L.Trainer, state: State | None) -> None:
    """Trains what is left. The last checkpoint comes after the last validation: found again, nothing is missing."""
    module, data = parts.module, parts.data
    ranks.on_first(lambda: _forget_later(parts, module.step if state else -1))
    if state is not None and module.step == module.steps:
        module.model.load_state_dict(state["model"])
        return
    trainer.fit(module, datamodule=data)
    last = collect(parts)
    if module.step % parts.settings.val_every:
        trainer.validate(module, datamodule=data, verbose=False)
    _commit(parts, last)


def _forget_later(parts: Parts, step: int) -> None:
    """Checkpoints and log lines of steps after this one are going to be made again."""
    checkpoint.set_aside_after(parts.run_dir / "checkpoints", step)
    forget_after(parts.run_dir / "metrics.jsonl", step)


def _save(parts: Parts) -> None:
    _commit(parts, collect(parts))
    _report(parts.run_dir, "running", parts.module.step)


def _commit(parts: Parts, state: State) -> None:
    folder, step = parts.run_dir / "checkpoints", parts.module.step
    ranks.on_first(lambda: checkpoint.save(folder, step, state, parts.settings.keep_last))


def _save_result(parts: Parts) -> None:
    if not ranks.is_first():
        return
    metrics = (parts.run_dir / "metrics.jsonl").read_text().splitlines()
    card = model_card(parts.settings.recipe_name, parts.module.model.config, [json.loads(line) for line in metrics])
    tokenizer = parts.tokenizer
    special = SpecialIds(tokenizer.bos_token_id, tokenizer.stop_token_ids, tokenizer.pad_token_id)
    save_pretrained(parts.run_dir / "model", parts.module.model, special, tokenizer.save, card)
    log.info("done: %s", parts.run_dir / "model")
