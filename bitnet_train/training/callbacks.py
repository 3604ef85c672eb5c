"""What happens between optimizer steps: saving, stopping when asked, and telling the user how far the run is."""

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitnet_train.errors import RunFailed
from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.signals import SIGNALS, TIME_OVER, StopRequested


class Checkpointing(L.Callback):
    """Saves every `every` steps and when asked; stops when asked, with the state saved.

    Asked means: a signal to any rank (the handler only sets a flag), a file SAVE or STOP in the run directory, or that
    the time is over. All ranks agree on it at a step boundary, after the validation of that step, so that a resumed run
    repeats nothing.

    Args:
        run_dir: where SAVE and STOP are looked for.
        every: optimizer steps between checkpoints.
        save: saves the state of the run, and returns why that failed ("" if it did not), on every rank the same.
        max_time: seconds from the start of training after which it is asked to stop.
    """

    def __init__(self, run_dir: Path, every: int, save: Callable[[], str], max_time: float = math.inf) -> None:
        self.run_dir, self.every, self.save, self.max_time = run_dir, every, save, max_time
        self._started = math.inf
        self._signal = 0
        self._saved_step = -1

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the signal handlers; Lightning, whose own end the run without saving, puts the old ones back."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _asked_by_file(self, name: str) -> bool:
        """Whether the file was there; the first rank looks, and removes it."""
        if not ranks.is_first():
            return False
        try:
            (self.run_dir / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _agreed(self) -> tuple[bool, str]:
        """Whether any rank was asked to save, and why to stop ("" for no reason)."""
        is_over = time.monotonic() - self._started >= self.max_time
        asked = [self._asked_by_file("SAVE"), self._asked_by_file("STOP"), is_over, self._signal]
        save, stop_file, over, number = ranks.maxima([int(value) for value in asked])
        reasons = {
            "STOP file": stop_file,
            TIME_OVER: over,
            **({signal.Signals(number).name: 1} if number else {}),
        }
        return bool(save), next((reason for reason, given in reasons.items() if given), "")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers where no sanity check did. What a run starts from is not saved again."""
        assert isinstance(pl_module, TrainingModule)
        self.on_sanity_check_start(trainer, pl_module)
        self._saved_step, self._started = pl_module.step, time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At a step boundary: saves if it is time or asked for, stops if asked to.

        Raises:
            StopRequested: it was asked to, and the state is saved.
            RunFailed: it was asked to, and the state could not be saved.
        """
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.at_step_boundary:
            return
        due = pl_module.step % self.every == 0 and pl_module.step != self._saved_step
        asked, reason = self._agreed()
        failure = self._save(pl_module) if asked or due or reason else ""
        if reason and failure:
            raise RunFailed(f"asked to stop ({reason}), but the state was not saved: {failure}")
        if reason:
            raise StopRequested(reason)

    def _save(self, module: TrainingModule) -> str:
        failure = self.save()
        if not failure:
            self._saved_step = module.step
        return failure


class ProgressReport(L.Callback):
    """Loss, tokens/s and time left: a bar on a terminal, otherwise a plain line at every log event."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self.print_line = print_line
        self._bar: Progress | None = None
        self._shown: dict[str, float] = {}
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the bar if somebody can see it."""
        assert isinstance(pl_module, TrainingModule)
        self._started, self._first_step = time.monotonic(), pl_module.step
        if sys.stdout.isatty() and ranks.is_first():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
            self._bar.add_task("starting", total=pl_module.steps, completed=pl_module.step)
            self._bar.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, or prints what the module has logged since."""
        self._show(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the last step."""
        self._show(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves the terminal as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _show(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        latest = pl_module.latest
        if self._bar is not None and latest:
            self._bar.update(self._bar.task_ids[0], completed=pl_module.step, description=_summary(latest))
        elif latest and latest is not self._shown:
            self._shown = latest
            done = pl_module.step - self._first_step
            left = (time.monotonic() - self._started) / done * (pl_module.steps - pl_module.step)
            self.print_line(f"step {pl_module.step}/{pl_module.steps}  {_summary(latest)}  {_duration(left)} left")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _summary(metrics: dict[str, float]) -> str:
    return f"loss {metrics['train/loss']:.4f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
