"""A report of values that are no numbers, and of layers that were measured at different steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.training.report import read_metrics, report
from tests.support import ROOT


def run_with(folder: Path, *events: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"step": 1, "train/loss": "x", "train/lr": 0.5}, {"step": 2, "train/loss": None}, [1])
    assert read_metrics(run) == {"train/lr": ([1], [0.5])}


@pytest.mark.parametrize("event", [{"step": 1, "train/loss": None}, {"step": float("inf"), "train/loss": 1.0}])
def test_a_run_without_figures_is_refused(tmp_path: Path, event: object) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no figures; let the run log a step first"):
        report(run_with(tmp_path, event))


def test_layers_that_were_measured_at_different_steps_have_gaps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = report(
        run_with(
            tmp_path,
            {"step": 1, "health/layers.0/zero": 1.0, "val/$\\frac{/$loss": 1.0},
            {"step": 2, "health/layers.1/zero": 0.5, "health/layers.0/zero": 0.2, "val/a\x1b[31m/loss": 1.0},
        )
    )
    assert "<h2>Every layer: zero</h2>" in page
    assert "\x1b" not in page


@pytest.mark.parametrize("out", ["a folder", "a place that takes no files"])
def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run = run_with(tmp_path / "run", {"step": 1, "train/loss": 1.0})
    target = run if out == "a folder" else Path("/proc/report.html")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), str(target)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {target}: cannot be written (")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]
