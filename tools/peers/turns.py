"""How the benchmark and a contestant take turns: two pipes, whose ends the contestant finds in its environment."""

import os
import sys

STARTED = "PEERS_STARTED"  # when the process was started, on the clock of time.monotonic
TURNS = "PEERS_TURNS"  # two file descriptors: a byte to read before each step but the first, one to write after it


def wait_for_turn() -> None:
    """Says that a step is done, and returns when the next one may begin; at once where nobody takes turns."""
    if turns := os.environ.get(TURNS):
        allowed, done = map(int, turns.split(","))
        os.write(done, b".")
        if not os.read(allowed, 1):
            sys.exit("nobody gives turns any more")
