"""Training runs in the process of the tests, where nothing has to be imported again, and what they logged."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from bitnet_train.cli import main


class Train(Protocol):
    """Trains with overrides in a folder and returns the run directory."""

    def __call__(self, run_dir: str, *overrides: str) -> Path: ...


def trainer_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`python -m bitnet_train OVERRIDES run_dir=...` in the folder; a run that does not end with 0 fails the test."""

    def train(run_dir: str, *overrides: str) -> Path:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["bitnet-train", *overrides, f"run_dir={run_dir}"])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 0
        return folder / run_dir

    return train


def train(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`tests.support.train` without a process of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["bitnet-train", *overrides])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit:
                code = int(exit.code or 0)
    return subprocess.CompletedProcess(overrides, code, out.getvalue(), err.getvalue())


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The log events of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last(run_dir: Path, name: str) -> float:
    """The last value of a metric."""
    return [event[name] for event in metrics(run_dir) if name in event][-1]
