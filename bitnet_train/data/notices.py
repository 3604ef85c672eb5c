"""Lines on standard error about the data of a run."""

import sys
from functools import cache

from bitnet_train.errors import printable


def say(message: str) -> None:
    """Says it now."""
    print(f"data: {printable(message)}", file=sys.stderr, flush=True)


@cache
def say_once(message: str) -> None:
    """Says it the first time that a process has it to say: training and validation may read the same files."""
    say(message)
