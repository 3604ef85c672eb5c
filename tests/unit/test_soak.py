"""What the soak compares: each difference that a kill could leave is seen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.soak import compare

CHECKS = ["same model bytes", "no step missing or twice", "same events", "no file left over"]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in what depends on the clock alone."""
    for name, rate in (("whole", 1.0), ("killed", 2.0)):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/model.safetensors").write_bytes(b"weights")
        events = [{"step": step, "train/loss": 1.0, "train/tokens_per_second": rate} for step in (1, 2, 3)]
        write(tmp_path / name, events)
    return tmp_path / "whole", tmp_path / "killed"


def write(run_dir: Path, events: list[dict[str, float]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def events(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_runs_that_differ_in_their_rates_are_the_same(runs: tuple[Path, Path]) -> None:
    assert compare(*runs) == dict.fromkeys(CHECKS, True)


DAMAGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weights": (lambda run: (run / "model/model.safetensors").write_bytes(b"others"), {CHECKS[0]}),
    "gap": (lambda run: write(run, events(run)[:1] + events(run)[2:]), {CHECKS[1], CHECKS[2]}),
    "double": (lambda run: write(run, [*events(run), events(run)[-1]]), {CHECKS[1], CHECKS[2]}),
    "end": (lambda run: write(run, events(run)[:2]), {CHECKS[1], CHECKS[2]}),
    "value": (lambda run: write(run, [{**event, "train/loss": 2.0} for event in events(run)]), {CHECKS[2]}),
    "leftover": (lambda run: (run / ".model.0123abcd.tmp").mkdir(), {CHECKS[3]}),
    "missing": (lambda run: shutil.copy(run / "metrics.jsonl", run.parent / "whole/other"), {CHECKS[3]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_difference_is_seen(runs: tuple[Path, Path], damage: str) -> None:
    harm, seen = DAMAGES[damage]
    harm(runs[1])
    assert {name for name, good in compare(*runs).items() if not good} == seen
