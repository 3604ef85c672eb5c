"""End to end against what a user would pick instead: the same model, rows, batch, optimizer and number of steps.

    python tools/benchmark_peers.py STAGE [--rounds N] [--steps N] [--json OUT] [key=value ...]

    pretrain    transformers' BitNet (AutoBitLinear online) in a plain loop; torchao and onebitllms where they run
    sft         TRL's SFTTrainer, packed and padded
    dpo         TRL's DPOTrainer, its reference beside the policy or computed before

STAGE is one of these. The data are the quickstart's (tools/prepare_quickstart.py), the weights of sft and dpo too
(make quickstart); `key=value` overrides the quickstart's recipe, such as init_from=DIR or model.hidden_size=1024.

Every contestant trains in a process of its own, in turns: a short first run, which fills caches (tokens, compiled code,
references), then one run per round. Ratios are taken round by round, and reported as median and quartiles.

    tokens/s       of the steps after the first three; a token is a position that predicts one of its own document
    seconds to     a held-out loss that all reach, from the start of the process, evaluations left out
    start          from the start of the process to the end of the first step, with filled caches, and without
    memory         the largest resident set of the process; on CUDA also of the device
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarking import Spread, context_line, ratios, unavailable, write_results
from bitnet_train.errors import UserError, run_command
from peers.clock import RESULT, STARTED
from peers.prepare import prepare, words_of
from peers.task import MODEL, Task

OURS = "bitnet_train"
WARM_UP, FIRST_RUN = 3, 4  # steps that a rate leaves out; steps of the run that fills caches
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


@dataclass(frozen=True)
class Run:
    """What the clock of one process said: seconds since its start, tokens of every step, (seconds, held-out loss)."""

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
    def rate(self) -> float:
        """Tokens per second after the first steps."""
        skip = min(WARM_UP, len(self.ends) - 1)
        return sum(self.tokens[skip:]) / (self.ends[-1] - self.ends[skip - 1])

    def seconds_to(self, loss: float) -> float:
        """When the held-out loss first fell to `loss`, on straight lines between the measurements; inf if never."""
        before: tuple[float, float] | None = None
        for seconds, value in self.losses:
            if value <= loss:
                share = (before[1] - loss) / (before[1] - value) if before else 1.0
                return before[0] + share * (seconds - before[0]) if before else seconds
            before = seconds, value
        return float("inf")


@dataclass(frozen=True)
class Result:
    """The runs of a contestant: the first one, and one of every round. Or the reason why there are none."""

    first: Run | None
    rounds: list[Run]
    reason: str = ""


def command(name: str, task: Task, out: Path, steps: int, overrides: Sequence[str]) -> list[str]:
    """The command line of a contestant that leaves its result in `out`."""
    if name != OURS:
        return [str(TOOLS / "peers" / "others.py"), name, str(out), str(task.folder), str(steps)]
    clock = {"_target_": "peers.ours.ReadClock", "folder": out, "task": task.folder, "every": task.eval_every}
    settings = [f"+callbacks.clock.{key}={value}" for key, value in clock.items()]
    run = (f"run_dir={out / 'run'}", f"init_from={task.folder / MODEL}", f"max_steps={steps}", "data.val=null")
    kept = [word for word in overrides if not word.startswith(("init_from=", "data.val="))]
    return ["-m", "bitnet_train", *words_of(task.stage, task.folder, kept), *settings, *run]


def environment(folder: Path) -> dict[str, str]:
    """No network, caches of this benchmark's own, and the time of the start."""
    own = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "datasets", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    caches = {name: str(folder / where) for name, where in own.items()}
    return {**os.environ, **quiet, **caches, "PYTHONPATH": path, STARTED: repr(time.monotonic())}


def run_contestant(name: str, task: Task, steps: int, overrides: Sequence[str]) -> Run | str:
    """One run in a process of its own, or the last line that it said before it failed."""
    with tempfile.TemporaryDirectory(dir=task.folder) as out:
        words = [sys.executable, *command(name, task, Path(out), steps, overrides)]
        done = subprocess.run(words, env=environment(task.folder), capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip() or "no message").splitlines()[-1]
        values = json.loads((Path(out) / RESULT).read_text())
    run = Run(**{**values, "losses": [(seconds, loss) for seconds, loss in values["losses"]]})
    print(f"{name}: start {run.start:.1f} s, {run.rate:,.0f} tokens/s", file=sys.stderr, flush=True)
    return run


def compare(task: Task, names: Sequence[str], rounds: int, overrides: Sequence[str], device: str) -> dict[str, Result]:
    """All contestants that can run here, in turns."""
    results = {name: _first(name, task, overrides, device) for name in names}
    for _ in range(rounds):
        for name, result in results.items():
            if not result.reason:
                run = run_contestant(name, task, task.steps, overrides)
                if isinstance(run, str):
                    results[name] = Result(None, [], run)
                else:
                    result.rounds.append(run)
    return results


def _first(name: str, task: Task, overrides: Sequence[str], device: str) -> Result:
    contestant = CONTESTANTS[task.stage][name]
    if reason := unavailable(contestant.needs, contestant.cuda_only, device):
        return Result(None, [], reason)
    run = run_contestant(name, task, min(FIRST_RUN, task.steps), overrides)
    return Result(None, [], run) if isinstance(run, str) else Result(run, [])


def common_loss(results: dict[str, Result]) -> float:
    """The lowest held-out loss that every run reached."""
    return max(min(loss for _, loss in run.losses) for result in results.values() for run in result.rounds)


def table(stage: str, results: dict[str, Result]) -> Table:
    """A line per contestant; the ratios say how many times better bitnet_train is."""
    loss = common_loss(results)
    ours = results[OURS].rounds
    shown = Table("contestant", "tokens/s", "ours is", f"seconds to {loss:.3f}", "ours is", "MB", "start, s", "differs")
    for name, result in results.items():
        differs = CONTESTANTS[stage][name].differs
        if result.reason:
            shown.add_row(name, f"not available: {result.reason}", *[""] * 5, differs)
            continue
        rates, own = [run.rate for run in result.rounds], [run.rate for run in ours]
        times, best = ([run.seconds_to(loss) for run in runs] for runs in (result.rounds, ours))
        assert result.first is not None
        shown.add_row(
            name,
            Spread.of(rates).text(",.0f"),
            Spread.of(ratios(own, rates)).text(),
            Spread.of(times).text(".1f"),
            Spread.of(ratios(times, best)).text(),
            Spread.of([max(run.host_bytes, run.device_bytes) / 1e6 for run in result.rounds]).text(",.0f"),
            f"{Spread.of([run.start for run in result.rounds]).text('.1f')}; first {result.first.start:.1f}",
            differs,
        )
    return shown


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=CONTESTANTS, metavar="STAGE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=5, help="steps between held-out losses, not timed")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="default: all; bitnet_train is always one")
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
    import torch

    arguments = _arguments()
    if arguments.rounds < 1 or not 1 <= arguments.eval_every <= arguments.steps or arguments.steps < 2:
        raise UserError("--rounds must be at least 1, --steps at least 2, and --eval-every from 1 to --steps")
    names, device = _names(arguments), "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="benchmark-peers-") as name:
        sizes = (arguments.steps, arguments.eval_every, arguments.overrides)
        task = prepare(arguments.stage, Path(name) / "task", *sizes)
        results = compare(task, names, arguments.rounds, arguments.overrides, device)
    Console(width=max(170, Console().width)).print(table(arguments.stage, results))
    print(context_line(torch.get_num_threads()))
    if arguments.json:
        write_results(arguments.json, {name: asdict(result) for name, result in results.items()})


if __name__ == "__main__":
    run_command(main)
