"""What the signals of schedulers and people mean: stop, and leave a state that the same command goes on from.

in the command, outside of training     there is nothing to save: `stop_on_signals` ends the run at once
in training                             `callbacks.Checkpointing` stops at the next step boundary, with the state saved
in a command that has launched ranks    `launch` hands the first signal to all of them and waits for them
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeAlias

from bitnet_train.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TIME_OVER = "trainer.max_time"  # the reason that ends a job, but not its sweep
Handler: TypeAlias = Callable[[int, FrameType | None], None]


class StopRequested(SystemExit):
    """The run was asked to stop and its state is saved; starting it again goes on.

    No error, so that nothing swallows it. A process that does not catch it ends with the exit code of a stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = EXIT_REQUEUE


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """The handler receives the signals while the block runs."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """A signal raises StopRequested where the block is; those after it change nothing, so that the end is orderly."""

    def stop(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise StopRequested(signal.Signals(number).name)

    with handled_by(stop):
        yield


def ignore_signals() -> None:
    """For a process that is stopping already: a second signal must not keep it from writing why."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
