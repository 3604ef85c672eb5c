"""tools/profile_step.py: where a GPU waits between kernels, and a step on whatever device there is."""

import sys

import pytest

import profile_step
from profile_step import Kernel, Wait, waits


def test_waits_are_the_gaps_that_no_kernel_fills() -> None:
    kernels = [Kernel("c", 30.0, 31.0), Kernel("a", 0.0, 10.0), Kernel("b", 4.0, 5.0), Kernel("d", 40.0, 45.0)]
    assert waits(kernels) == [Wait(20.0, "a", "c"), Wait(9.0, "c", "d")]
    assert waits(kernels[:1]) == []


def test_a_step_is_profiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"shape": "128x1", "tokens": 64, "seq": 32, "documents": 10, "vocab": 100, "rows": 5}
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *(f"--{name}={value}" for name, value in options.items())])
    profile_step.main()
    said = capsys.readouterr().out
    assert "aten::" in said
    assert "bitnet_train: " in said
    assert "tokens/s" in said
