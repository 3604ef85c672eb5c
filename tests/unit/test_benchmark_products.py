"""tools/benchmark_products.py: every product has a line, and what cannot be made says so."""

import json
import sys
from pathlib import Path

import pytest

import benchmark_products
from benchmark_products import Call, report
from bitnet_train.errors import UserError
from bitnet_train.losses import tokens


def run(monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_products.py", *(f"--{name}={x}" for name, x in options.items())])
    benchmark_products.main()


def test_every_product_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(tokens.LOGITS_PER_CHUNK)
    run(monkeypatch, hidden=128, tokens=64, seq=32, vocab=100, large=64, json=tmp_path / "out.json")
    times = json.loads((tmp_path / "out.json").read_text())["results"]
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if " cannot: " not in line]
    assert [line[:44].rstrip() for line in lines] == list(times)
    assert {"copy", "gate up: int8, ours", "down: ours, backward"} <= times.keys()
    assert sum(name.startswith("loss, ") for name in times) == 3
    assert min(times.values()) > 0
    assert all("%" in line for line in lines[3:])  # of the ceiling
    assert before == tokens.LOGITS_PER_CHUNK


def test_what_the_device_cannot_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel\nmore")

    assert report(iter([Call("a", fail, 1.0), Call("b", lambda: None, 1.0)]), "cpu").keys() == {"b"}
    assert "cannot: no such kernel" in capsys.readouterr().out


def test_rows_must_fill_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="multiple of --seq"):
        run(monkeypatch, hidden=128, tokens=65, seq=32)
