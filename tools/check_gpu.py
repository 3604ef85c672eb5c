"""Shows in one command, without a network, whatever needs a GPU: results, a killed run, memory, speed.

    python tools/check_gpu.py OUT
    python tools/check_gpu.py OUT --only tests profile         # some parts, see --help
    python tools/check_gpu.py OUT --only run --tiny            # on a CPU, to see that the parts still run

Every part is a command with a limit of its own, and none stops the others. OUT/summary.txt has the end of what each
printed, OUT/logs all of it. Text to train on are the Python sources of this machine. Parts that are timed run alone.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import bitnet_train  # noqa: F401  (before torch)

# isort: split

from benchmarking import context_line
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.formats.metrics import read_events

ROOT = Path(__file__).parent.parent
HELD_OUT = ("networkx", "jinja2", "json", "email")  # packages to validate on
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}


class Part(NamedTuple):
    """A command, the seconds that it may take, and the lines of its end that go to the summary."""

    name: str
    command: Sequence[str]
    limit: float = 90
    lines: int = 6
    stop_after: float | None = None
    environment: Mapping[str, str] = {}


class Check:
    """Runs parts in a folder and keeps what they print.

    Args:
        out: the folder.
        tiny: shapes for a CPU.

    Raises:
        UserError: the folder holds something: a run that has ended there would not be run again.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: the folder is not empty; name another one")
        self.out, self.tiny = out, tiny
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.data, self.summary = out / "data", (out / "summary.txt").open("w")
        self.began = time.monotonic()
        self.say(context_line())

    def say(self, line: str) -> None:
        """A line for the summary and for whoever watches."""
        print(line, flush=True)
        print(line, file=self.summary, flush=True)

    def run(self, *parts: Part) -> None:
        """Runs parts beside each other, and says how each ended."""
        running = [(part, self._start(part), time.monotonic()) for part in parts]
        for part, process, began in running:
            self._wait(part, process, began)

    def _start(self, part: Part) -> "subprocess.Popen[bytes]":
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **part.environment}
        with self._log(part).open("wb") as log:
            return subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)

    def _log(self, part: Part) -> Path:
        return self.out / "logs" / f"{part.name}.log"

    def _wait(self, part: Part, process: "subprocess.Popen[bytes]", began: float) -> None:
        try:
            code = process.wait(part.stop_after or part.limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                code = process.wait(part.limit)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        self.say(f"== {part.name}: exit code {code}, {time.monotonic() - began:.0f} s")
        text = self._log(part).read_text(errors="replace").splitlines()
        for line in text[-part.lines :]:
            self.say(f"   {line[:220]}")

    def training(self, run: str, *overrides: str, recipe: str = "pretrain") -> list[str]:
        """The command of a run in this folder."""
        return [
            *(sys.executable, "-m", "bitnet_train", f"+recipe={recipe}", f"trainer={'cpu' if self.tiny else 'gpu'}"),
            *(f"data.train={self.data / 'train.jsonl'}", f"data.tokenizer={self.data / 'tokenizer'}"),
            *(f"data.cache_dir={self.out / 'tokens'}", f"run_dir={self.out / run}", "health_every=0", *overrides),
        ]

    def tool(self, name: str, *options: str) -> list[str]:
        """The command of a tool."""
        return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *options]

    @property
    def vocab(self) -> int:
        """Ids of the tokenizer that is trained."""
        return 1024 if self.tiny else 16384

    def shape(self, sizes: Mapping[str, int]) -> list[str]:
        """The overrides of a model of these sizes."""
        kv_heads = sizes["num_attention_heads"] // 2
        pairs = {**sizes, "num_key_value_heads": kv_heads, "vocab_size": self.vocab}
        return [f"model.{name}={value}" for name, value in pairs.items()]


def write_sources(folder: Path, megabytes: float) -> None:
    """Python files of this machine as train.jsonl and val.jsonl, and train.jsonl's beginnings as chat.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")}
    files = sorted({file for root in roots for file in root.rglob("*.py") if 2000 < file.stat().st_size < 60_000})
    random.Random(0).shuffle(files)
    left = {"train": megabytes * 1e6, "val": min(megabytes / 4, 0.5) * 1e6, "chat": megabytes / 10 * 1e6}
    outputs = {name: (folder / f"{name}.jsonl").open("w") for name in left}
    for file in files:
        names = ("val",) if any(part in HELD_OUT for part in file.parts) else ("train", "chat")
        try:
            text = file.read_text()
        except (UnicodeDecodeError, OSError):
            continue
        for name in names:
            if left[name] > 0:
                messages = [{"role": "user", "content": file.name}, {"role": "assistant", "content": text[:1000]}]
                row = {"messages": messages} if name == "chat" else {"text": text}
                outputs[name].write(json.dumps(row) + "\n")
                left[name] -= len(text)
    for output in outputs.values():
        output.close()


def prepare(check: Check) -> None:
    """Text, and a tokenizer trained on it."""
    if not (check.data / "tokenizer").exists():
        write_sources(check.data, 0.4 if check.tiny else 40)
        options = ("--data", str(check.data / "chat.jsonl"), "--vocab-size", str(check.vocab))
        check.run(Part("tokenizer", check.tool("train_tokenizer", str(check.data / "tokenizer"), *options), lines=1))


def tests(check: Check) -> None:
    """The tests that need a GPU, or run on one where it is."""
    marked = ("-m", "gpu", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--tb=short")
    check.run(Part("tests", [sys.executable, "-m", "pytest", *marked, "-n", "8", "tests"], limit=200, lines=30))


def products(check: Check) -> None:
    """Products, attention and loss by themselves, and the passes between them."""
    small = ("--hidden", "128", "--tokens", "256", "--seq", "64", "--vocab", "512", "--large", "256")
    layer = ("--tokens", "64", "--hidden", "128", "--inner", "256", "--vocab", "512", "--rounds", "1")
    check.run(Part("products", check.tool("benchmark_products", *(small if check.tiny else ())), lines=60))
    check.run(
        Part("passes", check.tool("benchmark_passes", *(layer if check.tiny else ("--tokens", "16384"))), lines=12)
    )


def steps(check: Check) -> None:
    """Whole steps against the dense twin, in documents and with 2b4t's head: 20 layers, then 4 with all contestants."""
    if check.tiny:
        small = ("--shapes", "128x2", "--tokens", "256", "--seq", "64", "--documents", "30", "--vocab", "512")
        check.run(
            Part("steps", check.tool("benchmark_step", *small, "--contestants", "dense", "bitnet_train"), lines=5)
        )
        return
    common = ("--seq", "4096", "--documents", "1000", "--vocab", "128256", "--rounds", "5")
    whole = ("--shapes", "2560x20", "--tokens", "8192", "--contestants", "dense", "bitnet_train")
    check.run(Part("steps_whole", check.tool("benchmark_step", *whole, *common), lines=6))
    part = ("--shapes", "2560x4", "--tokens", "16384")
    check.run(Part("steps_all", check.tool("benchmark_step", *part, *common), limit=150, lines=12))


def profile(check: Check) -> None:
    """One step by its kernels, ours and the dense twin's."""
    small = ("--shape", "128x2", "--tokens", "256", "--seq", "64", "--vocab", "512", "--documents", "30")
    for name in ("bitnet_train", "dense"):
        options = ("--contestant", name, *(small if check.tiny else ()))
        check.run(Part(f"profile_{name}", check.tool("profile_step", *options), lines=50))


def run(check: Check) -> None:
    """A 125M model: stopped, resumed and exported; its dense twin; a small model in float32 here and on the CPU."""
    prepare(check)
    steps, length, rows = (6, 64, 2) if check.tiny else (200, 1024, 32)
    shape = ["model=tiny", *check.shape(TINY)] if check.tiny else ["model=125m", f"model.vocab_size={check.vocab}"]
    rate = (f"schedule.warmup_steps={max(1, steps // 10)}", "schedule.peak_lr=2.0e-3", "schedule.second_lr=1.2e-3")
    batch = (f"global_batch_size={rows}", f"micro_batch_size={rows}", f"data.sequence_length={length}")
    counts = (f"max_steps={steps}", f"log_every={max(1, steps // 10)}", f"checkpoint_every={10 * steps}")
    options = (*shape, *batch, *counts, *rate, f"data.val={check.data / 'val.jsonl'}", f"val_every={steps // 2}")
    ours = check.training("ours", *options)
    check.run(Part("train_stopped", ours, lines=3, stop_after=12 if check.tiny else 30))
    check.run(Part("train_resumed", ours, lines=4))
    folders = (str(check.out / "ours"), str(check.out / "packed"))
    check.run(Part("export", check.tool("export", *folders, "--format", "safetensors", "--force"), lines=2))
    check.run(Part("train_dense", check.training("dense", *options, "model.quantize=false"), lines=3))
    curve = (
        *("model=125m", *check.shape(SMALL), "global_batch_size=4", "micro_batch_size=4", "data.sequence_length=256"),
        *("max_steps=20", "log_every=1", *rate[1:], "schedule.warmup_steps=5", "trainer.precision=32-true"),
    )
    check.run(
        Part("curve", check.training("curve", *curve), lines=1),
        Part("curve_cpu", check.training("curve_cpu", *curve, "trainer=cpu"), lines=1),
        Part("curve_torch", check.training("curve_torch", *curve), lines=1, environment={"BITNET_TRAIN_NATIVE": "0"}),
    )
    for other in ("curve_cpu", "curve_torch"):
        check.say(f"   curve and {other}: {differences(check.out / 'curve', check.out / other)}")


def differences(*runs: Path) -> str:
    """How far the training losses of two runs are apart, step by step."""
    one, other = ([event["train/loss"] for event in read_events(run) if "train/loss" in event] for run in runs)
    apart = [abs(a - b) for a, b in zip(one, other, strict=False)]
    return f"{len(apart)} steps, first {apart[0]:.1e}, largest {max(apart):.1e}" if apart else "no steps"


def memory(check: Check) -> None:
    """MFU of a 700M run, and what fine-tuning 2B4T takes with moments in 8 bits."""
    prepare(check)
    length, rows = (64, 2) if check.tiny else (2048, 16)
    shape = ["model=tiny", *check.shape(TINY)] if check.tiny else ["model=700m"]
    batch = (f"global_batch_size={rows}", f"micro_batch_size={rows}", f"data.sequence_length={length}")
    pretraining = check.training("mfu", *shape, *batch, "max_steps=30", "log_every=10", "schedule.warmup_steps=5")
    check.run(Part("pretrain_700m", pretraining, lines=4))
    check.say(f"   {last_rates(check.out / 'mfu')}")
    chat = (f"data.train={check.data / 'chat.jsonl'}", "init_from=null", "global_batch_size=4", "micro_batch_size=2")
    of_2b4t = ("model=2b4t", "optimizer=adamw_8bit", "data.sequence_length=4096")
    model = (*shape, "data.sequence_length=1024") if check.tiny else of_2b4t
    tuning = check.training("sft", *model, *chat, "max_steps=10", "log_every=5", recipe="sft")
    check.run(Part("sft_2b4t", tuning, limit=120, lines=4))
    check.say(f"   {last_rates(check.out / 'sft')}")


def last_rates(run: Path) -> str:
    """Tokens per second and MFU of the last event that has them, and the peak of the GPU's memory."""
    names = ("train/tokens_per_second", "train/mfu", "train/peak_memory_gb")
    events = [event for event in read_events(run) if names[0] in event]
    return ", ".join(f"{name} {event[name]:.4g}" for event in events[-1:] for name in names if name in event)


PARTS: dict[str, Callable[[Check], None]] = {
    "tests": tests,
    "products": products,
    "steps": steps,
    "profile": profile,
    "run": run,
    "memory": memory,
}


def main() -> None:
    """Runs the parts."""
    about = "\n".join(f"    {name:12}{part.__doc__}" for name, part in PARTS.items())
    parser = ArgumentParser(
        description=f"{__doc__}\nParts:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    arguments = parser.parse_args()
    check = Check(arguments.out, arguments.tiny)
    for name in arguments.only:
        PARTS[name](check)
    check.say(f"done after {time.monotonic() - check.began:.0f} s")


if __name__ == "__main__":
    run_command(main)
