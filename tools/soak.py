"""Kills a small run at random moments and starts it again until it is done; then it must be as if nothing had happened.

    python tools/soak.py --kills 30 [--ranks 2] [--seed 0] [--json OUT]

An uninterrupted run comes first. The other is killed with SIGKILL: most times some steps after it has gone on, at times
while it starts; of several ranks, the launcher or any of them. At the end both must have the same model.safetensors,
the same events in metrics.jsonl (but for what depends on the clock) and the same files. Exit code 1 if they do not.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.formats.metrics import METRICS, Event, event_lines
from bitnet_train.options import integer, seed

ROOT = Path(__file__).resolve().parents[1]
EVERY = 3  # steps between checkpoints
STEPS_PER_KILL = 3
STARTS_HIT = 0.15  # share of the kills that come while the run starts
PATIENCE = 1800.0  # seconds in which a start must come to its next step, and a killed group must be gone
CLOCKED = ("tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gb", "data_wait")
RUN = [
    "+recipe=quickstart-pretrain",
    "model=tiny",
    "model.vocab_size=384",
    "model.hidden_size=128",
    "model.intermediate_size=256",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=64",
    "data.sequence_length=64",
    "data.tokenizer=tokenizer",
    "data.train=train.jsonl",
    "data.val=val.jsonl",
    "data.cache_dir=cache",
    "global_batch_size=4",
    "micro_batch_size=2",
    f"checkpoint_every={EVERY}",
    "keep_best=1",
    "log_every=1",
    "val_every=6",
    "health_every=4",
    "schedule.warmup_steps=2",
]


class Soak(NamedTuple):
    """What was done to the run, and what came of it."""

    kills: int
    ranks: int
    steps: int
    hits: dict[str, int]
    steps_repeated: int
    seconds: float
    seconds_whole: float
    checks: dict[str, bool]

    def table(self) -> str:
        """For people."""
        rows = {
            "kills": f"{self.kills} ({', '.join(f'{count} {what}' for what, count in sorted(self.hits.items()))})",
            "ranks": self.ranks,
            "steps": f"{self.steps}, {self.steps_repeated} of them made more than once",
            "seconds": f"{self.seconds:.0f}, {self.seconds_whole:.0f} without kills",
            **{name: "yes" if good else "NO" for name, good in self.checks.items()},
        }
        return "\n".join(f"{name:<24}{value}" for name, value in rows.items())


def main() -> int:
    """Entry point."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=integer(0), default=30)
    parser.add_argument("--ranks", type=integer(1), default=1, help="processes, trained by DDP on the CPU")
    parser.add_argument("--seed", type=seed, default=0, help="of the moments of the kills")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file too")
    options = parser.parse_args()
    if options.kills < 1 or options.ranks < 1:
        raise UserError(f"--kills and --ranks must be at least 1, got {options.kills} and {options.ranks}")
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        result = soak(Path(name), options.kills, options.ranks, options.seed)
    print(result.table())
    if options.json:
        options.json.write_text(json.dumps(result._asdict(), indent=2) + "\n")
    return 0 if all(result.checks.values()) else 1


def soak(folder: Path, kills: int, ranks: int, seed: int) -> Soak:
    """Runs once without and once with kills, in a folder."""
    _write_data(folder)
    steps = max(12, kills * STEPS_PER_KILL)
    start = Starter(folder, [*RUN, f"max_steps={steps}", *_trainer(ranks)])
    began = time.monotonic()
    start("whole").finish()
    whole = time.monotonic() - began
    chance, hits, made = random.Random(seed), Counter[str](), 0
    for number in range(1, kills + 1):
        where, step = _kill_once(start("killed"), folder / "killed", steps, chance)
        hits[where] += 1
        made += step
        print(f"kill {number}/{kills}: {where}, {step} steps after the start", flush=True)
    before = _step(folder / "killed")
    start("killed").finish()
    made += steps - before
    checks = compare(folder / "whole", folder / "killed")
    seconds = time.monotonic() - began - whole
    return Soak(kills, ranks, steps, dict(hits), max(0, made - steps), seconds, whole, checks)


def _write_data(folder: Path) -> None:
    """Texts of random words, and a tokenizer of them."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(60)]
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(120)]
    for name, part in (("train", texts[:100]), ("val", texts[100:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (folder / "tokenizer").mkdir()
    train_bpe(texts, 384).save(folder / "tokenizer")


def _trainer(ranks: int) -> list[str]:
    return ["trainer=cpu"] if ranks == 1 else ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"]


class Group:
    """A started run: the command and the ranks that it starts."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self.log = process, log

    def finish(self) -> None:
        """Waits for the end, which must be a good one."""
        if self.process.wait() != 0:
            raise UserError(f"the run ended with exit code {self.process.returncode}: {self.log.read_text()[-2000:]}")

    def members(self) -> list[int]:
        """The processes that are alive, the command first."""
        if self.process.poll() is not None:
            raise UserError(f"the run ended by itself, code {self.process.returncode}: {self.log.read_text()[-2000:]}")
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def kill(self, pid: int) -> None:
        """Kills one process and waits until all are gone: the others end by themselves."""
        members = self.members()
        os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{member}").exists() for member in members):
            if time.monotonic() > deadline:
                raise UserError(f"processes {members} outlive the kill of {pid}: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)


class Starter:
    """Starts runs in a folder."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, overrides

    def __call__(self, run_dir: str) -> Group:
        """`python -m bitnet_train ... run_dir=...`, on one thread: the sums must come in one order."""
        command = [sys.executable, "-m", "bitnet_train", *self.overrides, f"run_dir={run_dir}"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        log = self.folder / f"{run_dir}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=self.folder, env=variables, stdout=output, stderr=output)
        return Group(process, log)


def _kill_once(group: Group, run_dir: Path, steps: int, chance: random.Random) -> tuple[str, int]:
    """Kills a start at a random moment; returns where it was hit, and the steps that it had made."""
    first, before = _resumable(run_dir), _inode(run_dir)
    if chance.random() < STARTS_HIT:
        time.sleep(chance.uniform(0.0, 8.0))
    else:
        _wait_for(group, run_dir, min(steps - 1, first + chance.randint(1, 2 * EVERY)), before)
        time.sleep(chance.uniform(0.0, 0.05))
    group.kill(chance.choice(group.members()))
    saving = any((run_dir / "checkpoints").glob(".*.tmp"))
    made = max(0, _step(run_dir) - first) if _inode(run_dir) != before else 0
    return "in a save" if saving else "in training" if made else "at the start", made


def _wait_for(group: Group, run_dir: Path, step: int, before: int) -> None:
    """Until the run has logged a step; what an earlier start has logged does not count."""
    deadline = time.monotonic() + PATIENCE
    while _inode(run_dir) == before or _step(run_dir) < step:
        if group.process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"step {step} was not reached: {group.log.read_text()[-2000:]}")
        time.sleep(0.001)


def _inode(run_dir: Path) -> int:
    """Which file metrics.jsonl is: a start that goes on writes it anew, without the steps that it makes again."""
    file = run_dir / METRICS
    return file.stat().st_ino if file.exists() else 0


def _resumable(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")), default=0)


def _step(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    return int(max((event["step"] for event in _events(run_dir)), default=0))


def _events(run_dir: Path) -> list[Event]:
    """The log events without what depends on the clock; a line that a kill has torn does not count."""
    events = (event for _, event in event_lines(run_dir / METRICS) if event is not None)
    return [
        {name: value for name, value in event.items() if name.removeprefix("train/") not in CLOCKED} for event in events
    ]


def compare(whole: Path, killed: Path) -> dict[str, bool]:
    """What must be the same after kills."""
    model = "model/model.safetensors"
    steps = [event["step"] for event in _events(killed) if "train/loss" in event]
    return {
        "same model bytes": (whole / model).read_bytes() == (killed / model).read_bytes(),
        "no step missing or twice": steps == list(range(1, len(steps) + 1)) and len(steps) == _step(whole),
        "same events": _events(whole) == _events(killed),
        "no file left over": _files(whole) == _files(killed),
    }


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


if __name__ == "__main__":
    run_command(main)
