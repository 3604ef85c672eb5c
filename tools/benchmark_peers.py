"""End to end against what a user would pick instead: the same model, rows, batch, optimizer and number of steps.

    python tools/benchmark_peers.py STAGE [--steps N] [--starts N] [--json OUT] [key=value ...]

    pretrain    transformers' BitNet (AutoBitLinear online) in a plain loop; torchao and onebitllms where they run
    sft         TRL's SFTTrainer, packed and padded
    dpo         TRL's DPOTrainer, its reference beside the policy or computed before

STAGE is one of these. The data are the quickstart's (tools/prepare_quickstart.py), the weights of sft and dpo too
(make quickstart); `key=value` overrides the quickstart's recipe, such as init_from=DIR or model.hidden_size=1024.

Every contestant is a process of its own. It is started several times for one step, at first with empty caches (tokens,
compiled code, references; --caches keeps them). In the measurement all of them are alive and take turns, a step each
per round, so that a noisy machine is noisy for all. Ratios are taken within a round, and reported as median and
quartiles.

    tokens/s       of a step; a token is a position that predicts one of its own document. The first three are left out
    seconds to     a held-out loss that all reach: start and steps, without evaluations and the others' turns
    start          from the start of the process to the end of the first step; the first one fills the caches
    MB             the largest resident set of the process; on CUDA of the device if that is more
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from benchmarking import Spread, context_line, ratios, unavailable, write_results
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.options import integer
from peers.prepare import prepare, words_of
from peers.process import WARM_UP, Process, Run, fresh_folder
from peers.task import MODEL, Task

OURS = "bitnet_train"
TOOLS = Path(__file__).parent


@dataclass(frozen=True)
class Contestant:
    """What it needs to run, and what it does otherwise than bitnet_train."""

    needs: str | None
    differs: str
    cuda_only: bool = False


CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "pretrain": {
        OURS: Contestant(None, "documents of a row do not see each other"),
        "transformers": Contestant("transformers", "rows cut beforehand; documents of a row see each other"),
        "torchao": Contestant("torchao", "as transformers, other linear layers"),
        "onebitllms": Contestant("onebitllms", "as transformers, other linear layers", cuda_only=True),
    },
    "sft": {
        OURS: Contestant(None, "packed; conversations of a row do not see each other"),
        "trl, packed": Contestant("trl", "the packed rows of a batch are one row, with a mask by position ids"),
        "trl, padded": Contestant("trl", "a row per conversation, as many tokens per step"),
    },
    "dpo": {
        OURS: Contestant(None, "reference computed before and cached"),
        "trl": Contestant("trl", "reference beside the policy in every step"),
        "trl, precomputed": Contestant("trl", "reference computed before and cached"),
    },
}


@dataclass
class Result:
    """What was measured of a contestant, or the reason why nothing was.

    Attributes:
        starts: seconds to the first step, with empty caches at first.
        run: the measurement.
    """

    starts: list[float] = field(default_factory=list)
    run: Run | None = None
    reason: str = ""


def command(name: str, task: Task, out: Path, steps: int, overrides: Sequence[str]) -> list[str]:
    """The command line of a contestant that leaves its result in `out`."""
    if name != OURS:
        return [str(TOOLS / "peers" / "others.py"), name, str(out), str(task.folder), str(steps)]
    clock = {"_target_": "peers.ours.ReadClock", "folder": out, "task": task.folder, "every": task.eval_every}
    settings = [f"+callbacks.clock.{key}={value}" for key, value in clock.items()]
    run = (f"run_dir={out / 'run'}", f"init_from={task.folder / MODEL}", f"max_steps={steps}", "data.val=null")
    kept = [word for word in overrides if not word.startswith(("init_from=", "data.val="))]
    return ["-m", "bitnet_train", *words_of(task.stage, task.caches, kept), *settings, *run]


def environment(caches: Path) -> dict[str, str]:
    """No network, and caches of this benchmark's own."""
    own = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "datasets", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, **{name: str(caches / where) for name, where in own.items()}, "PYTHONPATH": path}


class Comparison:
    """All contestants of a task.

    Args:
        task: what they train.
        names: the contestants, ours first.
        overrides: of the quickstart's recipe.
        device: cpu or cuda.

    Attributes:
        results: by name; one that cannot run or fails keeps the reason.
    """

    def __init__(self, task: Task, names: Sequence[str], overrides: Sequence[str], device: str) -> None:
        self.task, self.overrides = task, overrides
        self.results = {name: Result() for name in names}
        for name, result in self.results.items():
            contestant = CONTESTANTS[task.stage][name]
            result.reason = unavailable(contestant.needs, contestant.cuda_only, device) or ""

    def _running(self) -> list[str]:
        return [name for name, result in self.results.items() if not result.reason]

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """A contestant that fails is out, with the reason; without ours there is nothing to compare with."""
        try:
            yield
        except UserError as error:
            if name == OURS:
                raise
            self.results[name].reason = str(error)

    def _process(self, name: str, steps: int) -> Process:
        out = fresh_folder(self.task.folder)
        began = time.monotonic()
        process = Process(command(name, self.task, out, steps, self.overrides), out, environment(self.task.caches))
        print(f"{name}: {time.monotonic() - began:.1f} s to the first step", file=sys.stderr, flush=True)
        return process

    def measure_starts(self, times: int) -> None:
        """Every contestant for one step, in turns."""
        for _ in range(times):
            for name in self._running():
                with self._failing(name):
                    self.results[name].starts.append(self._process(name, steps=1).finish().start)

    def take_turns(self) -> None:
        """The measurement."""
        processes: dict[str, Process] = {}
        for name in self._running():
            with self._failing(name):
                processes[name] = self._process(name, self.task.steps)
        for step in range(2, self.task.steps + 1):
            for name in self._running():
                with self._failing(name):
                    processes[name].step()
            print(f"step {step} of {self.task.steps}", file=sys.stderr, flush=True)
        for name in self._running():
            with self._failing(name):
                run = self.results[name].run = processes[name].finish()
                self.results[name].starts.append(run.start)


def table(stage: str, results: dict[str, Result]) -> Table:
    """A line per contestant; the ratios say how many times better bitnet_train is."""
    runs = {name: result.run for name, result in results.items() if result.run is not None}
    loss = max(min(loss for _, loss in run.losses) for run in runs.values())
    ours, shown = runs[OURS], Table("contestant", "tokens/s", "ours is", f"seconds to {loss:.3f}", "ours is")
    for column in ("MB", "first start; then, s", "differs"):
        shown.add_column(column)
    for name, result in results.items():
        differs = CONTESTANTS[stage][name].differs
        if (run := result.run) is None:
            shown.add_row(name, f"not available: {result.reason}", *[""] * 5, differs)
            continue
        shown.add_row(
            name,
            Spread.of(run.rates).text(",.0f"),
            Spread.of(ratios(ours.rates, run.rates)).text(),
            f"{run.seconds_to(loss):.1f}",
            f"{run.seconds_to(loss) / ours.seconds_to(loss):.2f}",
            f"{run.bytes / 1e6:,.0f}",
            starts_text(result.starts),
            differs,
        )
    return shown


def starts_text(starts: Sequence[float]) -> str:
    """The first one, whose caches may be empty, and the others."""
    first, *later = starts
    return f"{first:.1f}; then {Spread.of(later).text('.1f')}" if later else f"{first:.1f}"


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=CONTESTANTS, metavar="STAGE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--steps", type=integer(1), default=30, help="optimizer steps, a round each (default: %(default)s)"
    )
    parser.add_argument(
        "--starts", type=integer(0), default=3, help="starts besides the measurement's (default: %(default)s)"
    )
    parser.add_argument("--eval-every", type=integer(1), default=5, help="steps between held-out losses, not timed")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="default: all; bitnet_train is always one")
    parser.add_argument("--caches", type=Path, help="folder of the caches (default: a temporary one, empty at first)")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    return parser.parse_intermixed_args()


def _names(arguments: argparse.Namespace) -> list[str]:
    known = CONTESTANTS[arguments.stage]
    chosen = arguments.contestants or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"--contestants: {unknown[0]!r} is none of {', '.join(known)} (stage {arguments.stage})")
    return [OURS, *(name for name in chosen if name != OURS)]


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments()
    if arguments.steps <= WARM_UP or not 1 <= arguments.eval_every <= arguments.steps or arguments.starts < 0:
        raise UserError(f"--steps must be above {WARM_UP}, --eval-every from 1 to --steps, and --starts at least 0")
    names, device = _names(arguments), "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-") as name:
        folders = (Path(name) / "task", (arguments.caches or Path(name) / "caches").absolute())
        sizes = (arguments.steps, arguments.eval_every, arguments.overrides)
        task = prepare(arguments.stage, *folders, *sizes)
        comparison = Comparison(task, names, arguments.overrides, device)
        comparison.measure_starts(arguments.starts)
        comparison.take_turns()
    results = comparison.results
    Console(width=max(170, Console().width)).print(table(arguments.stage, results))
    print(context_line(torch.get_num_threads()))
    if arguments.json:
        write_results(arguments.json, {name: asdict(result) for name, result in results.items()})


if __name__ == "__main__":
    run_command(main)
