"""What BitNet's recipe does to the quality of small models, on the quickstart's real text, over several seeds.

python tools/benchmark_quality.py [--only NAME ...] [--seeds N] [--steps N] [--json OUT] [key=value ...]

    ternary    held-out nats per token of a BitNet, trained in two stages
    dense      the same of its dense twin, with the same tokens
    single     the same of a BitNet with one stage: the rate falls along one line, weight decay stays
    sum, mean  held-out nats per answer token after SFT of the BitNet, with the summed loss or its mean
    dpo        held-out share of pairs in which the chosen answer has the higher implicit reward, after DPO of `sum`
    likelihood the same by likelihood alone, before DPO

A figure is the mean over the seeds with its standard deviation; a difference is taken seed by seed. Overrides go to
every pre-training run, such as model.hidden_size=768 model.num_hidden_layers=12. Runs that are done are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitnet_train.errors import UserError, run_command
from bitnet_train.formats.atomic import atomic_file

DATA = Path("runs/quickstart/data")
PRETRAIN = {
    "ternary": [],
    "dense": ["model.quantize=false"],
    "single": ["schedule=wsd", "schedule.decay_share=1.0", "~schedule.second_lr"],
}
SFT = {
    "sum": ["stage.reduction=sum", "optimizer.grad_clip_per_token=true"],
    "mean": ["stage.reduction=mean"],
}
DIFFERENCES = (("ternary", "dense"), ("ternary", "single"), ("sum", "mean"), ("dpo", "likelihood"))


@dataclass(frozen=True)
class Options:
    """What is run: seeds 0 to `seeds` - 1, `steps` of pre-training, half of that of SFT, and a tenth of DPO."""

    out: Path
    seeds: int
    steps: int
    overrides: Sequence[str]

    def run(self, name: str, seed: int, *words: str) -> Path:
        """Trains unless it is done; the run directory."""
        run_dir = self.out / f"{name}-{seed}"
        if not (run_dir / "model").is_dir():
            common = [
                f"run_dir={run_dir}",
                f"seed={seed}",
                "checkpoint_every=100000",
                "health_every=0",
                "val_every=100000",
            ]
            command = [sys.executable, "-m", "bitnet_train", *words, *common]
            print("$", *command[1:], flush=True)
            if code := subprocess.run(command, check=False).returncode:
                sys.exit(code)
        return run_dir

    def pretrained(self, name: str, seed: int) -> Path:
        """A run of the first stage."""
        words = ["+recipe=quickstart-pretrain", f"max_steps={self.steps}", f"schedule.warmup_steps={self.steps // 6}"]
        return self.run(name, seed, *words, *PRETRAIN[name], *self.overrides)

    def tuned(self, name: str, seed: int) -> Path:
        """SFT of the ternary model."""
        words = ["+recipe=quickstart-sft", f"init_from={self.pretrained('ternary', seed)}"]
        return self.run(name, seed, *words, f"max_steps={max(1, self.steps // 2)}", *SFT[name])

    def aligned(self, seed: int) -> Path:
        """DPO of what the summed SFT left."""
        words = ["+recipe=quickstart-dpo", f"init_from={self.tuned('sum', seed)}"]
        return self.run("dpo", seed, *words, f"max_steps={max(1, self.steps // 10)}")


def validation(run_dir: Path, name: str, which: int) -> float:
    """A validation figure: the first (which 0) or the last (-1)."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float([event[name] for event in events if name in event][which])


def figure(options: Options, name: str, seed: int) -> float:
    """A figure of the module's text, for one seed."""
    if name in PRETRAIN:
        return validation(options.pretrained(name, seed), "val/loss", -1)
    if name in SFT:
        return validation(options.tuned(name, seed), "val/loss", -1)
    if name == "dpo":
        return validation(options.aligned(seed), "val/rewards/accuracies", -1)
    return validation(options.aligned(seed), "val/logps/accuracies", 0)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def measure(options: Options, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The figures by name, and the differences of those that are measured."""
    values = {name: [figure(options, name, seed) for seed in range(options.seeds)] for name in names}
    results = {name: spread(of_seeds) for name, of_seeds in values.items()}
    for left, right in DIFFERENCES:
        if left in values and right in values:
            pairs = zip(values[left], values[right], strict=True)
            results[f"{left} - {right}"] = spread([a - b for a, b in pairs])
    return results


def show(results: dict[str, dict[str, float]], seeds: int) -> None:
    """The results as a table."""
    table = Table("figure", "mean", f"standard deviation over {seeds} seeds")
    for name, result in results.items():
        table.add_row(name, f"{result['mean']:.4f}", f"{result['sd']:.4f}")
    Console().print(table)


def _arguments() -> argparse.Namespace:
    names = [*PRETRAIN, *SFT, "dpo", "likelihood"]
    parser = argparse.ArgumentParser(description="Quality of small BitNets and their variants, over several seeds.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=120, help="steps of pre-training; SFT has half, DPO a tenth")
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
    options = Options(arguments.out, arguments.seeds, arguments.steps, arguments.overrides)
    results = measure(options, arguments.only)
    show(results, options.seeds)
    if arguments.json:
        with atomic_file(arguments.json) as file:
            file.write_text(json.dumps({"steps": options.steps, "seeds": options.seeds, "results": results}, indent=2))


if __name__ == "__main__":
    run_command(main)
