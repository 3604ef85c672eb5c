"""When the steps of a contestant ended, what they had trained on, and how good the model was by then.

    t     seconds since the process was started, without those that the held-out loss and waiting for a turn took
    loss  nats per label of the held-out rows; of pairs DPO's loss with beta = 0.1

A token is a position whose next token belongs to the same document: neither padding nor the last of a document.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarking import resident_bytes, synchronize
from peers.task import HELD_OUT

STARTED = "PEERS_STARTED"  # the variable that says when the process was started, on the clock of time.monotonic
TURNS = "PEERS_TURNS"  # the variable with two file descriptors: a byte to read before each step, one to write after it
RESULT = "result.json"
BETA = 0.1


def device_of(model: nn.Module) -> str:
    """The kind of device of the model's weights."""
    return next(model.parameters()).device.type


@torch.no_grad()
def logps(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the labels of each row in nats, `(rows,)`, for a decoder of ours or of transformers.

    Row by row, so that the logits of all of them never exist: the peak of memory is the training's.
    """
    head = model.head_weight if hasattr(model, "head_weight") else model.get_output_embeddings().weight
    device, sums = device_of(model), []
    with torch.autocast(device, torch.bfloat16):
        for row, targets in zip(input_ids.to(device), labels.to(device), strict=True):
            output = model.model(row[None])
            hidden = getattr(output, "last_hidden_state", output)
            logits = F.linear(hidden[0], head).float()
            sums.append(-F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    return torch.stack(sums).cpu()


def held_out_loss(model: Any, rows: dict[str, Tensor]) -> float:
    """The loss of the module's text; `rows` with `reference_logps` `(2, pairs)` are chosen ones, then rejected ones."""
    sums = logps(model, rows["input_ids"], rows["labels"])
    if "reference_logps" not in rows:
        return float(-sums.sum() / (rows["labels"] != -100).sum())
    chosen, rejected = sums.view(2, -1) - rows["reference_logps"]
    return float(-F.logsigmoid(BETA * (chosen - rejected)).mean())


def wait_for_turn() -> None:
    """Says that a step is done, and returns when the next one may begin; at once where nobody takes turns."""
    if turns := os.environ.get(TURNS):
        allowed, done = map(int, turns.split(","))
        os.write(done, b".")
        if not os.read(allowed, 1):
            sys.exit("nobody gives turns any more")


class Clock:
    """Writes down every step, and at the end the result.

    Args:
        folder: the contestant's own; the result goes there.
        task: the folder of the task, see `peers.task`.
        every: steps between two looks at the held-out rows.
    """

    def __init__(self, folder: str, task: str, every: int) -> None:
        self.folder, self.every = Path(folder), every
        self.rows = load_file(Path(task) / HELD_OUT)
        self._zero, self._tokens = float(os.environ[STARTED]), 0
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[tuple[float, float]] = []

    def count(self, tokens: int) -> None:
        """Adds to the tokens of the step that is under way."""
        self._tokens += tokens

    def start(self) -> None:
        """What was counted before the first step, such as a reference's tokens, is no training."""
        self._tokens = 0

    def step_ended(self, model: nn.Module) -> None:
        """Right after an update of the model's weights."""
        synchronize(device_of(model))
        now = time.monotonic()
        self.ends.append(now - self._zero)
        self.tokens.append(self._tokens)
        if len(self.ends) % self.every == 0:
            self.losses.append((self.ends[-1], held_out_loss(model, self.rows)))
        self._tokens = 0
        wait_for_turn()
        self._zero += time.monotonic() - now

    def finish(self) -> None:
        """Writes the result, with the peak of memory in bytes: of the process, and of the CUDA device if it has one."""
        device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        result = {
            "ends": self.ends,
            "tokens": self.tokens,
            "losses": self.losses,
            "host_bytes": resident_bytes(),
            "device_bytes": device_bytes,
        }
        (self.folder / RESULT).write_text(json.dumps(result))
