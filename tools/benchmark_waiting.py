"""How fast the quickstart's pre-training is beside programs that keep cores busy, by how OpenMP's threads wait.

    ours       what `bitnet_train/__init__.py` sets: a thread that waits for others looks 4,000 times, then it sleeps
    spinning   it looks 300,000 times, some milliseconds: what GNU's OpenMP does where nothing is said
    N          it looks N times (GOMP_SPINCOUNT)

    python tools/prepare_quickstart.py && python tools/benchmark_waiting.py [--busy 0 1 2] [--ranks 1] [--rounds 3]

A run is the command itself in a process of its own; its rate is the median over log events of a step, the first ones
left out. Every round begins with another way, the ratio to `spinning` is taken round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarking import Spread, context_line, ratios
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.kernels.processor import HAS_BFLOAT16
from bitnet_train.options import integer

SPINNING = "300000"
_WARM_UP, _RATE = 3, "train/tokens_per_second"  # steps left out, the metric
_BUSY = "while True: pass"
_ROWS = 8  # of a step of the quickstart's, shared out over the ranks


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing else than take a core."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(way: str, ranks: int, steps: int) -> float:
    """Tokens per second of a run."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    variables |= {} if way == "ours" else {"GOMP_SPINCOUNT": SPINNING if way == "spinning" else way}
    with tempfile.TemporaryDirectory(prefix="benchmark-waiting-") as folder:
        words = [
            *("+recipe=quickstart-pretrain", f"run_dir={folder}", f"max_steps={steps}", "schedule.warmup_steps=1"),
            *("data.val=null", "log_every=1", "health_every=0", "checkpoint_every=1000"),
            *([f"trainer=ddp trainer.accelerator=cpu trainer.devices={ranks}"] if ranks > 1 else ["trainer=cpu"]),
            f"micro_batch_size={_ROWS // ranks}",
            *([] if HAS_BFLOAT16 else ["trainer.precision=32-true"]),
        ]
        command = [sys.executable, "-m", "bitnet_train", *" ".join(words).split()]
        subprocess.run(command, env=variables, check=True, capture_output=True)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    logged = [event[_RATE] for event in map(json.loads, lines) if _RATE in event]
    return float(statistics.median(logged[_WARM_UP:]))


def measure(ways: Sequence[str], others: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The rates of every way beside so many busy processes, a value for each round."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with busy(others):
        for number in range(arguments.rounds):
            turned = number % len(ways)
            for way in (*ways[turned:], *ways[:turned]):
                rates[way].append(rate(way, arguments.ranks, arguments.steps))
    return rates


def main() -> None:
    """Reads the command line, measures, prints the table."""
    parser = ArgumentParser(description="Benchmark training beside busy processes.")
    parser.add_argument("--busy", nargs="+", type=integer(0), default=[0, 1, 2], help="processes that take a core each")
    parser.add_argument("--ways", nargs="+", default=["ours"], help="ours, or a number of looks")
    parser.add_argument("--ranks", type=integer(1, _ROWS), default=1, help="of a run (default: %(default)s)")
    parser.add_argument("--steps", type=integer(_WARM_UP + 1), default=12, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=integer(1), default=3, help="runs of every way (default: %(default)s)")
    arguments = parser.parse_args()
    ways = [*arguments.ways, "spinning"]
    shown = Table("busy", "way", "tokens/s", "times spinning")
    for others in arguments.busy:
        rates = measure(ways, others, arguments)
        for way in ways:
            gain = Spread.of(ratios(rates[way], rates["spinning"]))
            shown.add_row(str(others), way, Spread.of(rates[way]).text(",.0f"), gain.text())
    console = Console()
    console.print(shown)
    console.print(f"{context_line()}; {arguments.ranks} ranks")


if __name__ == "__main__":
    run_command(main)
