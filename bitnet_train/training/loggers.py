"""Where a run logs: metrics.jsonl, kept over resumes, and the loggers of its configuration beside it."""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.metrics import event_lines
from bitnet_train.training import objects

log = logging.getLogger(__name__)

_WANDB_ID = "wandb-id.txt"
_VARIABLES = {"name": "WANDB_NAME", "id": "WANDB_RUN_ID"}  # W&B's own, which a user has set


class JsonlLogger(Logger):
    """Appends {"step": ..., "tokens": ..., name: value, ...} to a file. Always on; other loggers stand beside it.

    A line that the disk does not take waits for the next one; no checkpoint is written before it is (`flush`).
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._waiting = ""

    @property
    def name(self) -> str:
        """What Lightning calls this logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """One file per run: there are no versions."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's configuration is in .hydra/config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one line and hands it to the operating system at once."""
        self._waiting += json.dumps({"step": step, **metrics}) + "\n"
        try:
            self.flush()
        except OSError as error:
            log.warning("%s: cannot be written (%s); its lines wait for the next event", self.file, error.strerror)

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: the disk does not take it; the file ends with a whole line still.
        """
        if self._waiting:
            append(self.file, self._waiting)
            self._waiting = ""


def append(file: Path, text: str) -> None:
    """Appends all of a text or nothing.

    Raises:
        OSError: the disk does not take it.
    """
    content = text.encode()
    with file.open("ab", buffering=0) as stream:
        size = stream.tell()
        try:
            while content:
                content = content[stream.write(content) :]
        except OSError:
            _cut(file, size)
            raise


def _cut(file: Path, size: int) -> None:
    if file.is_file():  # a device has nothing to cut
        os.truncate(file, size)


def make_loggers(config: DictConfig, run_dir: Path, is_resumed: bool) -> list[Logger]:
    """The loggers that the configuration names.

    One of Weights & Biases gets the configuration, the name of the run, and the id under which the run that is resumed
    was logged, each where nothing else was set.
    """
    known = {
        "config": OmegaConf.to_container(config, resolve=True),
        "name": run_name(config.recipe_name, run_dir),
        "id": _wandb_id(run_dir) if is_resumed else None,
    }
    return [_logger(node, known) for node in objects.checked(config.logger, "logger", Logger)]


def _logger(node: DictConfig, known: Mapping[str, object]) -> Logger:
    if not str(node.get("_target_")).endswith(WandbLogger.__name__):
        logger: Logger = instantiate(node)
        return logger
    chosen = {key for key in known if node.get(key) is not None or os.environ.get(_VARIABLES.get(key, ""))}
    make = instantiate(node, _partial_=True)
    return cast(Logger, make(**{key: value for key, value in known.items() if key not in chosen}))


def run_name(recipe: str, run_dir: Path) -> str:
    """The recipe and the last two folders of the run directory, in which a job of a sweep is a number alone."""
    return "-".join([recipe, *(part for part in run_dir.resolve().parts[-2:] if part != recipe)])


def _wandb_id(run_dir: Path) -> str | None:
    try:
        return (run_dir / _WANDB_ID).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def begin_wandb(loggers: Sequence[Logger], run_dir: Path) -> None:
    """Begins the run of Weights & Biases, where one is asked for, and keeps its id in the run directory.

    Raises:
        UserError: there is no login, or W&B does not take an option.
        RunFailed: its server cannot be reached, or refuses.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            name = _begun(logger)
            with atomic_file(run_dir / _WANDB_ID) as temporary:
                temporary.write_text(f"{name}\n", encoding="utf-8")


def _begun(logger: WandbLogger) -> str:
    """The id of the run."""
    from wandb import errors

    files_alone = "log to files alone with WANDB_MODE=offline, or choose logger=none"
    try:
        return str(logger.experiment.id)
    except (errors.UsageError, errors.AuthenticationError) as error:
        raise UserError(f"logger=wandb: {_reason(error)}; log in with `wandb login`, {files_alone}") from error
    except errors.Error as error:
        raise RunFailed(f"logger=wandb: {_reason(error)}; start the same command again, {files_alone}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"logger.wandb: {_reason(error)}; correct or remove this option") from error


def _reason(error: Exception) -> str:
    return str(error).rstrip(".")


def finish_wandb() -> None:
    """Ends a run of Weights & Biases: the next job of a sweep would go on writing to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def forget_after(file: Path, step: int) -> None:
    """Removes the lines of steps after `step`: a resumed run is going to make them again. A torn line goes, too."""
    if not file.exists():
        return
    kept = [line for line, event in event_lines(file) if event is not None and event["step"] <= step]
    with atomic_file(file) as temporary:
        temporary.write_bytes(b"".join(line.rstrip() + b"\n" for line in kept))
