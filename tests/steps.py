"""Callbacks for runs that a test does harm to: they make them slow, tell the test where they are, or fail."""

import time
from pathlib import Path
from typing import Any

import lightning as L

from bitnet_train.errors import UserError


class Slow(L.Callback):
    """Every micro-batch and every validation takes at least `seconds`, and adds a byte to a file of run_dir."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stay(trainer, "batches")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stay(trainer, "validations")

    def _stay(self, trainer: L.Trainer, name: str) -> None:
        if trainer.is_global_zero:
            with Path(trainer.default_root_dir, name).open("a") as file:
                file.write(".")
        time.sleep(self.seconds)


class FailingJobs(L.Callback):
    """Job 1 of a sweep asks for what is not possible, job 2 fails inside of training."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        job = Path(trainer.default_root_dir).name
        if job == "1":
            raise UserError("no seed 1")
        if job == "2":
            raise FloatingPointError("diverged")
