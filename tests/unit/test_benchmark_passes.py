"""tools/benchmark_passes.py: every pass is measured both ways, and each way is the one that it says."""

import json
import sys
from pathlib import Path

import pytest
import torch

import benchmark_passes
from bitnet_train.kernels import native


def test_every_pass_is_measured_in_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"tokens": 8, "hidden": 128, "inner": 64, "vocab": 50, "rounds": 2}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["benchmark_passes.py", *options, f"--json={tmp_path / 'out.json'}"])
    benchmark_passes.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:34].rstrip() for line in lines[2:]] == list(results)
    assert len(results) == 9
    for seconds in results.values():
        assert len(seconds["ours"]) == len(seconds["torch"]) == 2
        assert min(*seconds["ours"], *seconds["torch"]) > 0


def test_torch_s_turn_is_torch_s() -> None:
    seen: list[bool] = []
    one = benchmark_passes.Pass("look", lambda: seen.append(native.available(torch.zeros(1))), 1)
    benchmark_passes.compare(one, 1, "cpu")
    assert seen == [native.library() is not None, False] * 2
