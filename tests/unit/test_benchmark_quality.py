"""The quality benchmark: what starts from what, what is read off, what is not repeated. No run is trained here."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tool's functions, with a training that only writes metrics: the loss is the seed, accuracies go up."""
    functions = runpy.run_path(str(ROOT / "tools" / "benchmark_quality.py"))
    functions["trained"] = []

    def train(words: Sequence[str]) -> None:
        functions["trained"].append(list(words))
        options = dict(word.partition("=")[::2] for word in words)
        run = Path(options["run_dir"])
        (run / "model").mkdir(parents=True)
        names = ("val/logps/accuracies", "val/rewards/accuracies", "train/rewards/accuracies")
        events = [{"step": step, **dict.fromkeys(names, step / 4), "val/loss": 9.0} for step in (2, 3)]
        events.append({"step": 3, "val/loss": int(options["seed"]) + ("model.quantize=false" in words)})
        (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    monkeypatch.setitem(functions["run_dir"].__globals__, "train", train)
    return functions


def measured(tool: dict[str, Any], out: Path, *names: str) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = tool["measure"](tool["Options"](out, 100, ["model.x=1"]), names, 3)
    return results


def test_figures_are_means_and_differences_are_taken_seed_by_seed(tool: dict[str, Any], tmp_path: Path) -> None:
    results = measured(tool, tmp_path, "ternary", "dense", "code", "code likelihood")
    assert results["ternary"] == {"mean": 1.0, "sd": 1.0}
    assert results["ternary - dense"] == {"mean": -1.0, "sd": 0.0}
    assert results["code - code likelihood"] == {"mean": 0.25, "sd": 0.0}
    assert len((tmp_path / "figures.jsonl").read_text().splitlines()) == 12


def test_every_run_starts_from_the_one_of_its_seed(tool: dict[str, Any], tmp_path: Path) -> None:
    measured(tool, tmp_path, "dpo")
    dpo = tool["trained"][5]
    assert [Path(words[-5].partition("=")[2]).name for words in tool["trained"][3:6]] == ["ternary-1", "sum-1", "dpo-1"]
    assert f"init_from={tmp_path / 'sum-1'}" in dpo
    assert "max_steps=10" in dpo
    assert "model.x=1" not in dpo
    assert "model.x=1" in tool["trained"][3]


def test_a_run_that_is_done_is_not_repeated(tool: dict[str, Any], tmp_path: Path) -> None:
    first = measured(tool, tmp_path, *tool["FIGURES"])
    count = len(tool["trained"])
    assert count == 3 * len(tool["RUNS"])
    assert measured(tool, tmp_path, *tool["FIGURES"]) == first
    assert len(tool["trained"]) == count
