"""What BitNet's recipe does to the quality of small models, on the quickstart's real text, over several seeds.

python tools/benchmark_quality.py [--only NAME ...] [--seeds N] [--steps N] [--json OUT] [key=value ...]

    ternary     held-out nats per token of a BitNet, trained in two stages
    dense       the same of its dense twin, with the same tokens
    single      the same of a BitNet with one stage: the rate falls along one line, weight decay stays
    sum, mean   held-out nats per answer token after SFT of the BitNet, with the summed loss or its mean
    likelihood  share of held-out pairs of answers in which `sum` gives the chosen one more likelihood
    dpo         share in which it has the higher implicit reward, after DPO of `sum`
    code        the same of pairs of bad and good code, after DPO of `sum` on those; `code likelihood` before,
                `code trained` for the training pairs of the last ten logged steps
    long        `code` with four times the steps at three times the rate; `long trained` likewise
    anchored    `long` with an SFT term on the good code beside; `anchored trained` likewise

A figure is the mean over the seeds with its standard deviation; a difference is taken seed by seed. Overrides go to
every pre-training run, such as model.hidden_size=768 model.num_hidden_layers=12. A run that is done is not repeated:
started again, the tool goes on, and OUT/figures.jsonl gains a line for every figure.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import bitnet_train.training.run  # noqa: F401  (imported once, for all the runs that are forked from this process)
from bitnet_train import cli
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.metrics import read_events
from bitnet_train.options import integer

DATA = Path("runs/quickstart/data")
QUIETLY = ("checkpoint_every=100000", "health_every=0", "val_every=100000")
CODE = [f"data.train={DATA}/code/train.jsonl", f"data.val={DATA}/code/heldout.jsonl"]
LONG = [*CODE, "schedule.peak_lr=3e-4"]


@dataclass(frozen=True)
class Run:
    """A training run: a quickstart recipe, the run that it starts from, its steps as a share of pre-training's."""

    recipe: str
    start: str | None
    share: float
    overrides: Sequence[str] = ()


RUNS = {
    "ternary": Run("pretrain", None, 1.0),
    "dense": Run("pretrain", None, 1.0, ["model.quantize=false"]),
    "single": Run("pretrain", None, 1.0, ["schedule=wsd", "schedule.decay_share=1.0"]),
    "sum": Run("sft", "ternary", 0.5, ["stage.reduction=sum", "optimizer.grad_clip_per_token=true"]),
    "mean": Run("sft", "ternary", 0.5, ["stage.reduction=mean"]),
    "dpo": Run("dpo", "sum", 0.1),
    "code": Run("dpo", "sum", 0.32, CODE),
    "long": Run("dpo", "sum", 1.25, LONG),
    "anchored": Run("dpo", "sum", 1.25, [*LONG, "stage.rpo_alpha=1.0"]),
}
FIRST, LAST, LAST_TEN = (0, 1), (-1, None), (-10, None)  # from and to
CODE_RUNS = ("code", "long", "anchored")


@dataclass(frozen=True)
class Figure:
    """The mean of some of the values that a run logged: the last, or the first, taken before its first step."""

    run: str
    metric: str
    which: tuple[int, int | None] = LAST


FIGURES = {
    **{name: Figure(name, "val/loss") for name in ("ternary", "dense", "single", "sum", "mean")},
    "likelihood": Figure("dpo", "val/logps/accuracies", FIRST),
    "dpo": Figure("dpo", "val/rewards/accuracies"),
    "code likelihood": Figure("code", "val/logps/accuracies", FIRST),
    **{name: Figure(name, "val/rewards/accuracies") for name in CODE_RUNS},
    **{f"{name} trained": Figure(name, "train/rewards/accuracies", LAST_TEN) for name in CODE_RUNS},
}
DIFFERENCES = (
    ("ternary", "dense"),
    ("ternary", "single"),
    ("sum", "mean"),
    ("dpo", "likelihood"),
    ("code", "code likelihood"),
    ("anchored", "long"),
)


@dataclass(frozen=True)
class Options:
    """Where runs go, the steps of pre-training, and its overrides."""

    out: Path
    steps: int
    overrides: Sequence[str]


def run_dir(options: Options, name: str, seed: int) -> Path:
    """Trains unless it is done, after what the run starts from; the run directory."""
    folder, run = options.out / f"{name}-{seed}", RUNS[name]
    if (folder / "model").is_dir():
        return folder
    words = [
        f"+recipe=quickstart-{run.recipe}",
        f"max_steps={max(1, round(run.share * options.steps))}",
        *run.overrides,
    ]
    if run.start is None:
        words += [f"schedule.warmup_steps={options.steps // 6}", *options.overrides]
    else:
        words += [f"init_from={run_dir(options, run.start, seed)}"]
    train([*words, f"run_dir={folder}", f"seed={seed}", *QUIETLY])
    return folder


def train(words: Sequence[str]) -> None:
    """`python -m bitnet_train WORDS` in a process of its own; ends this one where that fails."""
    print("$ python -m bitnet_train", *words, flush=True)
    process = multiprocessing.get_context("fork").Process(target=_train, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def _train(words: Sequence[str]) -> None:
    sys.argv[1:] = words
    cli.main()


def value(options: Options, name: str, seed: int) -> float:
    """A figure of the module's text, for one seed; also added to figures.jsonl."""
    figure = FIGURES[name]
    events = read_events(run_dir(options, figure.run, seed))
    logged = [event[figure.metric] for event in events if figure.metric in event]
    found = statistics.fmean(logged[slice(*figure.which)])
    with (options.out / "figures.jsonl").open("a") as file:
        file.write(json.dumps({"figure": name, "seed": seed, "value": found}) + "\n")
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def measure(options: Options, names: Sequence[str], seeds: int) -> dict[str, dict[str, float]]:
    """The figures by name, and the differences of those that are measured; one seed after another."""
    by_seed = [{name: value(options, name, seed) for name in names} for seed in range(seeds)]
    results = {name: spread([values[name] for values in by_seed]) for name in names}
    for left, right in DIFFERENCES:
        if left in names and right in names:
            results[f"{left} - {right}"] = spread([values[left] - values[right] for values in by_seed])
    return results


def show(results: dict[str, dict[str, float]], seeds: int) -> None:
    """The results as a table."""
    table = Table("figure", "mean", f"standard deviation over {seeds} seeds")
    for name, result in results.items():
        table.add_row(name, f"{result['mean']:.4f}", f"{result['sd']:.4f}")
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Quality of small BitNets and their variants, over several seeds.")
    names = ", ".join(FIGURES)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME", help=names)
    parser.add_argument("--seeds", type=integer(1), default=3, help="number of seeds")
    parser.add_argument("--steps", type=integer(1), default=120, help="of pre-training; SFT has half, DPO a tenth")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_quality"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of every pre-training run")
    return parser.parse_args()


def main() -> None:
    """Reads the command line, trains and shows the figures."""
    arguments = _arguments()
    if arguments.seeds < 1 or arguments.steps < 6:
        raise UserError(f"--seeds must be at least 1 and --steps 6, got {arguments.seeds} and {arguments.steps}")
    if not DATA.is_dir():
        raise UserError(f"{DATA}: no data there; make it first: python tools/prepare_quickstart.py")
    results = measure(Options(arguments.out, arguments.steps, arguments.overrides), arguments.only, arguments.seeds)
    show(results, arguments.seeds)
    if arguments.json:
        summary = {"steps": arguments.steps, "seeds": arguments.seeds, "results": results}
        with atomic_file(arguments.json) as file:
            file.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_command(main)
