"""From nothing to a deployed model: what `make quickstart` runs.

    data -> pretrain -> sft -> dpo -> packed safetensors, GGUF I2_S -> verified, evaluated, sampled

Everything lies under runs/quickstart/. A part that is done is not done again, and one that was killed goes on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import ArgumentParser, printable, run_command
from bitnet_train.evaluation.perplexity import Likelihood, evaluate
from bitnet_train.export import ExportResult, export, verify
from bitnet_train.formats.metrics import Event, read_events
from bitnet_train.generate import Sampling, complete
from bitnet_train.kernels.processor import HAS_BFLOAT16
from bitnet_train.model.pretrained import load_for_inference

ROOT = Path("runs/quickstart")
STAGES = ("pretrain", "sft", "dpo")
QUESTIONS = (
    "What does the ruff rule `{rule}` check?",
    "Explain what the rule `{rule}` does.",
    "My linter reports `{rule}`. What did it find?",
)


def command(*arguments: str) -> None:
    """Runs a Python command of this project as a user would, and ends with its exit code if it fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def is_done(run_dir: Path) -> bool:
    """Whether a run has ended and left its result."""
    status = run_dir / "status.json"
    return (run_dir / "model").is_dir() and status.is_file() and json.loads(status.read_text())["state"] == "done"


def train(overrides: list[str]) -> None:
    """The three stages, each from the one before."""
    for stage in STAGES:
        if not is_done(ROOT / stage):
            command("-m", "bitnet_train", f"+recipe=quickstart-{stage}", f"run_dir={ROOT / stage}", *overrides)


def exported(target: Path, **how: Any) -> ExportResult:
    """The export, made if it is not there or is of other masters, and compared with them in any case."""
    source = ROOT / "dpo" / "model"
    if target.exists() and not (verification := verify(source, target)).mismatches:
        size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
        return ExportResult(target, size, (), verification)
    return export(source, target, force=True, **how)


def events(stage: str) -> list[Event]:
    """The log events of a stage, oldest first."""
    return read_events(ROOT / stage)


def first_and_last(stage: str, name: str) -> tuple[float, float]:
    """A validation figure before the first step and after the last."""
    values = [event[name] for event in events(stage) if name in event]
    return values[0], values[-1]


def median_rate(stage: str) -> float:
    """Tokens per second, the median over the log events."""
    rates = sorted(event["train/tokens_per_second"] for event in events(stage) if "train/tokens_per_second" in event)
    return rates[len(rates) // 2]


def stages_table(english: Likelihood, xz: float) -> Table:
    """Stage, steps, tokens/s, held-out figure before and after."""
    table = Table("stage", "steps", "tokens/s", "held-out figure", "before", "after")
    before = first_and_last("pretrain", "val/loss")[0] / english["nll"] * english["bits_per_byte"]
    rows = {
        "pretrain": (f"English, bits per byte (xz -9: {xz:.3f})", before, english["bits_per_byte"]),
        "sft": ("answers, nats per token", *first_and_last("sft", "val/loss")),
        "dpo": ("pairs where chosen is likelier", *first_and_last("dpo", "val/logps/accuracies")),
    }
    for stage, (figure, start, end) in rows.items():
        steps = f"{events(stage)[-1]['step']:.0f}"
        table.add_row(stage, steps, f"{median_rate(stage):,.0f}", figure, f"{start:.3f}", f"{end:.3f}")
    reward = first_and_last("dpo", "val/rewards/accuracies")[1]
    table.add_row("", "", "", "pairs with the higher implicit reward", "", f"{reward:.3f}")
    return table


def exports_table(results: list[ExportResult]) -> Table:
    """Sizes and the result of reading back."""
    masters = ROOT / "dpo" / "model"
    table = Table("file", "MB", "verification")
    table.add_row(str(masters), _megabytes(sum(file.stat().st_size for file in masters.iterdir())), "float32 masters")
    for result in results:
        table.add_row(str(result.path), _megabytes(result.bytes), str(result.verification))
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _samples(packed: Path, heldout: Path) -> list[tuple[str, str]]:
    """Three questions about rules that training never saw, and the packed model's answers."""
    rules = []
    for line in heldout.read_text().splitlines():
        name = json.loads(line)["messages"][0]["content"].split("`")[1]
        if name not in rules:
            rules.append(name)
    model, tokenizer = load_for_inference(packed), Tokenizer.from_folder(packed)
    asked = [question.format(rule=rule) for question, rule in zip(QUESTIONS, rules, strict=False)]
    how = Sampling(temperature=0.7, top_p=0.9)
    return [(q, complete(model, tokenizer, q, chat=True, max_new_tokens=64, how=how)) for q in asked]


def _english() -> Likelihood:
    """Held-out English under the pre-trained model; measured once and kept."""
    kept = ROOT / "pretrain" / "english.json"
    if not kept.is_file():
        model, tokenizer = load_for_inference(ROOT / "pretrain/model"), Tokenizer.from_folder(ROOT / "pretrain/model")
        result = evaluate(model, tokenizer, str(ROOT / "data/pretrain/heldout.jsonl"), sequence_length=256)
        kept.write_text(json.dumps(result))
    likelihood: Likelihood = json.loads(kept.read_text())
    return likelihood


def _main() -> int:
    parser = ArgumentParser(description="Train, export, verify and sample a small BitNet under runs/quickstart.")
    parser.add_argument("overrides", nargs="*", help="given to every stage, for example max_steps=4")
    overrides = parser.parse_args().overrides
    if not HAS_BFLOAT16:
        print("this processor has no bfloat16 products: trainer.precision=32-true")
        overrides = ["trainer.precision=32-true", *overrides]
    command("tools/prepare_quickstart.py", "--out", str(ROOT / "data"))
    train(overrides)
    packed = exported(ROOT / "packed", format="safetensors")
    gguf = exported(ROOT / "model.gguf", format="gguf", type="i2_s")
    summary = json.loads((ROOT / "data" / "summary.json").read_text())
    console = Console(width=max(100, Console().width))
    console.print(stages_table(_english(), summary["heldout_xz"]["bits_per_byte_alone"]), exports_table([packed, gguf]))
    for question, answer in _samples(packed.path, ROOT / "data/sft/heldout.jsonl"):
        console.print(f"\n[bold]{question}[/bold]")
        console.print(printable(answer.strip()), markup=False, highlight=False)
    failed = [result for result in (packed, gguf) if result.verification is None or result.verification.mismatches]
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(_main)
