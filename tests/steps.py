"""A callback for runs that a test does harm to: it makes them slow enough, and tells the test where they are."""

import time
from pathlib import Path
from typing import Any

import lightning as L


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
