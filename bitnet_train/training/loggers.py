"""metrics.jsonl: one JSON object per log event, kept over resumes."""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


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


def finish_wandb() -> None:
    """Ends a run of Weights & Biases: the next job of a sweep would go on writing to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def forget_after(file: Path, step: int) -> None:
    """Removes the lines of steps after `step`: a resumed run is going to make them again. A torn last line goes too."""
    if not file.exists():
        return
    kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as stream:
        stream.writelines(f"{line}\n" for line in kept)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
