"""tools/check_gpu.py: parts run beside each other, end in time, and say how; docs/benchmarks.md runs one for real."""

import json
import sys
from pathlib import Path

import pytest

import check_gpu
from bitnet_train.errors import UserError
from check_gpu import Check, Part, differences, last_rates, write_sources
from tests.support import write_jsonl


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path / "out", tiny=True)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_parts_say_how_they_ended_and_stop_no_other(check: Check) -> None:
    slow = "import time; print('waits', flush=True); time.sleep(60)"
    check.run(
        Part("fails", python("print('a'); print('b'); raise SystemExit(3)"), lines=1),
        Part("slow", python(slow), limit=2),
        Part("variable", python("import os; print(os.environ['A'])"), environment={"A": "7"}),
    )
    said = (check.out / "summary.txt").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in said] == [
        *("== fails: exit code 3", "   b"),
        *("== slow: exit code -15", "   waits"),
        *("== variable: exit code 0", "   7"),
    ]
    assert (check.out / "logs" / "fails.log").read_text() == "a\nb\n"


def test_a_part_is_stopped_as_a_cluster_does(check: Check) -> None:
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(85)); print(1, flush=True); time.sleep(60)"
    )
    check.run(Part("stopped", python(program), stop_after=2))
    assert "== stopped: exit code 85" in (check.out / "summary.txt").read_text()


def test_a_folder_with_results_is_not_used_again(check: Check) -> None:
    """A run that has ended there would not be run again, and its figures would stand for new ones."""
    with pytest.raises(UserError, match="the folder is not empty; name another one"):
        Check(check.out, tiny=True)


def test_sources_become_rows(tmp_path: Path) -> None:
    write_sources(tmp_path, 0.02)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("train", "val", "chat")
    }
    assert {row["text"] for row in rows["train"]}.isdisjoint(row["text"] for row in rows["val"])
    assert [message["role"] for message in rows["chat"][0]["messages"]] == ["user", "assistant"]
    assert sum(len(row["text"]) for row in rows["train"]) >= 20_000


def test_figures_are_read_from_the_logs(tmp_path: Path) -> None:
    for name, losses in (("a", [2.0, 1.5]), ("b", [2.0, 1.25])):
        (tmp_path / name).mkdir()
        events = [{"step": i, "train/loss": x, "train/tokens_per_second": 10.0 * i} for i, x in enumerate(losses)]
        write_jsonl(tmp_path / name / "metrics.jsonl", [*events, {"step": 2, "val/loss": 1.0}])
    assert differences(tmp_path / "a", tmp_path / "b") == "2 steps, first 0.0e+00, largest 2.5e-01"
    assert differences(tmp_path / "a", tmp_path / "none") == "no steps"
    assert last_rates(tmp_path / "a") == "train/tokens_per_second 10"


def test_every_part_has_a_line_in_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--help"])
    with pytest.raises(SystemExit):
        check_gpu.main()
    said = capsys.readouterr().out
    assert all(f"    {name:12}{part.__doc__}" in said for name, part in check_gpu.PARTS.items())
