"""Runs of two ranks by one command, and what is done to them: signals, dead and hanging ranks, a dead launcher.

All harm is done to one run, which is started again each time. In the end it is the run that nothing was done to.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.forked import train
from tests.runs import metrics
from tests.support import TINY_PRETRAIN, write_corpus

TWO = [
    *TINY_PRETRAIN,
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "max_steps=60",
    "checkpoint_every=3",
    "val_every=1000",
]
SLOW = ["+callbacks.slow._target_=tests.steps.Slow", "+callbacks.slow.seconds=0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nothing happens to."""
    result = train(*TWO, "run_dir=whole", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "whole"


class Started:
    """The run that harm is done to, started once more: its command, its ranks, and how it ended."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.run_dir = folder / "harmed"
        for name in ("batches", "validations"):
            (self.run_dir / name).unlink(missing_ok=True)
        self.log = folder / "log"
        self.log.write_text("")
        self.process = forked.start(*TWO, *SLOW, "run_dir=harmed", *overrides, cwd=folder, log=self.log)

    @property
    def output(self) -> str:
        """What the command and its ranks have said."""
        return self.log.read_text()

    @property
    def ranks(self) -> list[int]:
        """The processes of the ranks, in their order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.exitcode is None, self.output
            assert time.monotonic() < deadline, "it did not get there"
            time.sleep(0.02)

    def wait_for(self, name: str, count: int) -> None:
        """Until it has seen so many batches or validations since it was started."""
        file = self.run_dir / name
        self.wait_until(lambda: file.exists() and file.stat().st_size >= count)

    def end(self) -> int:
        """The exit code; nothing may be left behind."""
        self.process.join(60)
        assert not (self.run_dir / "STOP").exists()
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Sends the command a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def status(self) -> dict[str, object]:
        status: dict[str, object] = json.loads((self.run_dir / "status.json").read_text())
        return status


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(*overrides: str) -> Started:
        started.append(Started(folder, *overrides))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.join()


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_command_runs_two_ranks(whole: Path) -> None:
    assert json.loads((whole / "status.json").read_text()) == {"state": "done", "step": 60, "reason": ""}
    assert {path.name for path in (whole / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
        "resolved.yaml",
    }
    assert [event["step"] for event in metrics(whole) if "train/loss" in event] == list(range(1, 61))
    lines = (whole / "train.log").read_text().splitlines()
    assert sum("60 steps of 4 rows" in line for line in lines) == 1  # the second rank says nothing
    assert sum(line.startswith("done: ") for line in lines) == 1


def test_a_signal_while_it_starts_is_a_stop(start: Callable[..., Started]) -> None:
    run = start()
    run.wait_until(lambda: len(run.ranks) == 2)
    run.signal(signal.SIGINT)
    assert run.end() == 85
    assert "stopped (SIGINT)" in run.output


@pytest.mark.parametrize("where", ["batches", "validations"])
def test_two_signals_to_the_command_are_one_stop(start: Callable[..., Started], where: str) -> None:
    run = start("val_every=2")
    run.wait_for(where, 2)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGUSR1)
    assert run.end() == 85
    status = run.status()
    assert status["state"] == "requeue"
    assert status["reason"] in ("SIGTERM", "SIGUSR1")  # whichever came through first
    assert (run.run_dir / f"checkpoints/step-{status['step']:06}").is_dir()


def test_a_signal_to_one_rank_stops_both(start: Callable[..., Started]) -> None:
    run = start()
    run.wait_for("batches", 3)
    os.kill(run.ranks[1], signal.SIGUSR2)
    assert run.end() == 85
    assert run.status()["reason"] == "SIGUSR2"


def test_a_dead_rank_ends_the_run_and_is_named(start: Callable[..., Started]) -> None:
    run = start()
    run.wait_for("batches", 5)
    ranks = run.ranks
    os.kill(ranks[1], signal.SIGKILL)
    assert run.end() == 1
    (line,) = [line for line in run.output.splitlines() if "SIGKILL" in line]
    assert f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in line
    saved = max(int(path.name[5:]) for path in (run.run_dir / "checkpoints").glob("step-*"))
    assert f"start the same command again: it goes on from step {saved}" in line
    assert run.status()["state"] == "failed"
    assert not any(map(alive, ranks))


def test_a_dead_launcher_leaves_no_rank(start: Callable[..., Started]) -> None:
    run = start()
    run.wait_for("batches", 3)
    ranks = run.ranks
    assert len(ranks) == 2
    run.process.kill()
    run.process.join()
    deadline = time.monotonic() + 30
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, ranks))


def test_a_rank_that_hangs_is_named_and_ended(start: Callable[..., Started]) -> None:
    run = start("rank_timeout=10")
    run.wait_for("batches", 3)
    ranks = run.ranks
    os.kill(ranks[1], signal.SIGSTOP)
    assert run.end() == 1
    assert f"rank 1 (process {ranks[1]}) hung" in run.output
    assert not any(map(alive, ranks))


def test_a_mistake_is_said_once(folder: Path) -> None:
    result = train(*TWO, "run_dir=mistake", "data.train=nothing-*.jsonl", cwd=folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert "nothing-*.jsonl" in result.stderr


def test_in_the_end_it_is_the_run_that_nothing_happened_to(folder: Path, whole: Path) -> None:
    result = train(*TWO, "run_dir=harmed", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    left, right = (run / "model/model.safetensors" for run in (whole, folder / "harmed"))
    assert left.read_bytes() == right.read_bytes()
    losses = [
        [(e["step"], e["train/loss"]) for e in metrics(run.parents[1]) if "train/loss" in e] for run in (left, right)
    ]
    assert losses[0] == losses[1]
