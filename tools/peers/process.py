"""A contestant's process: how it is started, given its turns, and asked for its result."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking import ratios
from bitnet_train.errors import UserError
from peers.clock import RESULT, STARTED, TURNS

WARM_UP = 3  # steps that a rate leaves out: libraries compile in them


@dataclass(frozen=True)
class Run:
    """What the clock of a process said, see `peers.clock`."""

    ends: list[float]
    tokens: list[int]
    losses: list[tuple[float, float]]
    host_bytes: int
    device_bytes: int

    @property
    def start(self) -> float:
        """Seconds to the end of the first step."""
        return self.ends[0]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every step after the first ones."""
        seconds = [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        return ratios([float(tokens) for tokens in self.tokens[1:]], seconds)[WARM_UP - 1 :]

    @property
    def bytes(self) -> int:
        """Peak of memory, of the process or of its CUDA device."""
        return max(self.host_bytes, self.device_bytes)

    def seconds_to(self, loss: float) -> float:
        """When the held-out loss first fell to `loss`, on straight lines between the measurements; inf if never."""
        before: tuple[float, float] | None = None
        for seconds, value in self.losses:
            if value <= loss:
                share = (before[1] - loss) / (before[1] - value) if before else 1.0
                return before[0] + share * (seconds - before[0]) if before else seconds
            before = seconds, value
        return float("inf")


class Process:
    """A running contestant that stops after every step until `step` is called.

    Args:
        command: its words, with what Python is given first; the result is written to the folder `out`.
        out: an empty folder.
        environment: variables of its own.

    Raises:
        UserError: by any call, if the process has failed; with the last line of its log.
    """

    def __init__(self, command: Sequence[str], out: Path, environment: Mapping[str, str]) -> None:
        self.out = out
        allowed, self._allow = os.pipe()
        self._done, done = os.pipe()
        own = {STARTED: repr(time.monotonic()), TURNS: f"{allowed},{done}"}
        with (out / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env={**environment, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(allowed, done),
            )
        os.close(allowed)
        os.close(done)
        self._wait()

    def step(self) -> None:
        """Lets it make one step."""
        os.write(self._allow, b".")
        self._wait()

    def _wait(self) -> None:
        if not os.read(self._done, 1):
            self._fail()

    def _fail(self) -> None:
        lines = (self.out / "log").read_text().split("\n")
        raise UserError([line for line in lines if line.strip()][-1] if any(lines) else "ended without a word")

    def finish(self) -> Run:
        """Lets it end after its last step."""
        os.write(self._allow, b".")
        if self._process.wait() or not (self.out / RESULT).is_file():
            self._fail()
        os.close(self._allow)
        os.close(self._done)
        values = json.loads((self.out / RESULT).read_text())
        return Run(**{**values, "losses": [(seconds, loss) for seconds, loss in values["losses"]]})


def fresh_folder(inside: Path) -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp(dir=inside))
