"""A run, from its configuration to the folder of its result.

start       the ranks meet and compare what they were started with; weights, data and stage are built (`parts`)
resume      the newest checkpoint of the run directory, if there is one
fit         Lightning's loop over `TrainingModule`
result      run_dir/model, an HF folder of master weights; status.json says how it ended
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import lightning as L
from omegaconf import DictConfig, OmegaConf

from bitnet_train.config import RunConfig
from bitnet_train.errors import RunFailed, UserError
from bitnet_train.formats.atomic import sweep
from bitnet_train.formats.metrics import read_events
from bitnet_train.formats.safetensors_file import LazyTensors
from bitnet_train.formats.shards import State, fill
from bitnet_train.memory import keep_freed_memory
from bitnet_train.model.pretrained import SpecialIds, write_pretrained
from bitnet_train.training import checkpoint, out_of_memory, ranks
from bitnet_train.training.card import model_card
from bitnet_train.training.collected import collected
from bitnet_train.training.lock import RunLock, locked
from bitnet_train.training.loggers import begin_wandb, finish_wandb, forget_after
from bitnet_train.training.parts import Parts, build, print_plan
from bitnet_train.training.saving import Saver
from bitnet_train.training.signals import StopRequested, ignore_signals, stop_on_signals
from bitnet_train.training.state import Found, Restore, check_weights, collect
from bitnet_train.training.status import report_status, write_status
from bitnet_train.training.trainer import check_options, make_trainer, quiet_lightning

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
        _refuse_pickles()
        check_options(config.trainer)
        with locked(run_dir) as lock:
            ranks.on_first(lambda: sweep(run_dir))
            _run(build(settings, config, run_dir), config, lock)


def _refuse_pickles() -> None:
    """No library that reads a file on the way may unpickle it."""
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0") != "0":
        raise UserError(
            "the environment sets TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, with which files that are read could run code; "
            "unset it"
        )
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def _digest(config: DictConfig) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(config, resolve=True).encode()).hexdigest()[:16]


def _run(parts: Parts, config: DictConfig, lock: RunLock) -> None:
    found, settings = _resume(parts), parts.settings
    saver = Saver(parts.run_dir / "checkpoints", settings.keep_last, settings.keep_best, settings.rank_timeout)
    restore = Restore(found, settings.seed)
    trainer = make_trainer(parts, config, [restore], lambda: _save(parts, collect(parts), lock, saver))
    print_plan(parts)
    if not settings.dry_run:
        _train(parts, lambda: _fit(parts, trainer, found, lock, saver), saver)


def _train(parts: Parts, fit: Callable[[], str], saver: Saver) -> None:
    run_dir = parts.run_dir
    _report(run_dir, "running", parts.module.step)
    try:
        with out_of_memory.explained(lambda: out_of_memory.training(parts.module)):
            unsaved = fit()
        _finish(parts, unsaved)
    except StopRequested as stop:
        ignore_signals()
        _check_saved(saver, str(stop))
        _report(run_dir, "requeue", parts.module.step, str(stop))
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        _report(run_dir, "failed", parts.module.step, reason)
        raise
    finally:
        finish_wandb()


def _check_saved(saver: Saver, reason: str) -> None:
    """What is being written when a run is asked to stop is its last state."""
    try:
        saver.wait_here()
    except OSError as error:
        raise RunFailed(f"asked to stop ({reason}), but the state was not saved: {error}") from error


def _report(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """The first rank writes status.json, if it can."""
    if ranks.is_first():
        report_status(run_dir, state, step, reason)


def _resume(parts: Parts) -> Found | None:
    """The state to go on from, if there is one; step and position are set already."""
    found = ranks.on_first(lambda: checkpoint.find(parts.run_dir / "checkpoints", parts.settings.resume))
    if found is None:
        return None
    state = checkpoint.load(found, parts.identity, parts.settings.resume_allow)
    check_weights(Found(found, state), parts.module.model)
    parts.module.step, parts.module.tokens = state["step"], state["tokens"]
    parts.data.first_step = parts.module.step
    log.info("resuming from %s", found)
    return Found(found, state)


def _fit(parts: Parts, trainer: L.Trainer, found: Found | None, lock: RunLock, saver: Saver) -> str:
    """Trains what is left; returns why the last checkpoint could not be written.

    It comes after the last validation: found again, nothing is missing.
    """
    module, data = parts.module, parts.data
    is_done = found is not None and module.step >= module.steps
    if not is_done:
        ranks.on_first(lambda: begin_wandb(trainer.loggers, parts.run_dir))
    ranks.on_first(lambda: _forget_later(parts, module.step if found else -1))
    if found is not None and is_done:
        module.model.load_state_dict(fill({"model": found.state["model"]}, found.folder)["model"])
        return ""
    trainer.fit(module, datamodule=data)
    last = collect(parts)
    if module.step % parts.settings.val_every:
        trainer.validate(module, datamodule=data, verbose=False)
    return _save(parts, last, lock, saver) or saver.wait()


def _forget_later(parts: Parts, step: int) -> None:
    """Checkpoints and log lines of steps after this one are going to be made again."""
    folder, settings = parts.run_dir / "checkpoints", parts.settings
    checkpoint.set_aside_after(folder, step)
    checkpoint.settle(folder, settings.keep_last, settings.keep_best)
    forget_after(parts.metrics.file, step)


def _save(parts: Parts, state: State, lock: RunLock, saver: Saver) -> str:
    """Writes a checkpoint; returns why that failed, and "" if it did not, on every rank the same.

    No checkpoint is newer than its log lines.
    """
    module, validated = parts.module, parts.module.validated
    loss = validated[1] if validated is not None and validated[0] == module.step else None
    failure = _on_first(lambda: _flush(parts, lock)) or saver.save(module.step, state, loss)
    if not failure:
        _report(parts.run_dir, "running", module.step)
    elif ranks.is_first():
        log.warning(
            "step %d: no checkpoint was written (%s); those before it stay, and the next is tried when it is due",
            module.step,
            failure,
        )
    return failure


def _flush(parts: Parts, lock: RunLock) -> None:
    lock.check()
    parts.metrics.flush()


def _finish(parts: Parts, unsaved: str) -> None:
    """Writes the result.

    Raises:
        RunFailed: it could not be written, or the last checkpoint could not.
    """
    done = partial(write_status, parts.run_dir, "done", parts.module.step)
    failure = ranks.attempt(lambda: _write_result(parts)) or unsaved or _on_first(done)
    if failure:
        raise RunFailed(
            f"the run has come to its end, but not all of it could be written: {failure}; make room, then start it "
            "again: it goes on from the newest checkpoint"
        )


def _on_first(write: Callable[[], None]) -> str:
    """Why the first rank could not write."""
    return ranks.attempt(lambda: write() if ranks.is_first() else None)


def _write_result(parts: Parts) -> None:
    """Every rank hands its rows to the first one, which writes."""
    with collected(parts.module.model.state_dict()) as weights:
        if ranks.is_first():
            _write_model(parts, weights)


def _write_model(parts: Parts, weights: Iterable[LazyTensors]) -> None:
    parts.metrics.flush()
    config = parts.module.model.config
    card = model_card(parts.settings.recipe_name, config, read_events(parts.run_dir))
    tokenizer = parts.tokenizer
    special = SpecialIds(tokenizer.bos_token_id, tokenizer.stop_token_ids, tokenizer.pad_token_id)
    write_pretrained(parts.run_dir / "model", config, weights, special, tokenizer.save, card)
    log.info("done: %s", parts.run_dir / "model")
