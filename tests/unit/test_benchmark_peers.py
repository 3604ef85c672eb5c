"""The comparison with peers: how times become figures, and one whole comparison at the smallest size."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bitnet_train.data.batches import TokenRow, collate
from bitnet_train.errors import UserError
from tests.support import ROOT, environment

TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """The tool, which finds its neighbours by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import benchmark_peers

        yield benchmark_peers


def run_of(peers: ModuleType, seconds_per_step: float) -> Any:
    """Ten steps of 100 tokens after 5 seconds of start; the loss falls from 3 by 0.5 every second step."""
    ends = [5.0 + seconds_per_step * (1 + step) for step in range(10)]
    losses = [(ends[step], 3.0 - 0.25 * (step - 1)) for step in range(1, 10, 2)]
    return peers.Run(ends, [100] * 10, losses, 3_000_000, 1_000_000)


def test_spread_and_ratios(peers: ModuleType) -> None:
    spread = peers.Spread.of([3.0, 1.0, 2.0])
    assert spread == (1.0, 2.0, 3.0)
    assert spread.text() == "2.00 (1.00 to 3.00)"
    assert peers.Spread.of([4.0]) == (4.0, 4.0, 4.0)
    assert peers.ratios([6.0, 9.0], [2.0, 9.0]) == [3.0, 1.0]


def test_rates_leave_out_the_first_steps(peers: ModuleType) -> None:
    run = peers.Run([40.0, 60.0, 70.0, 71.0, 73.0], [1, 1, 1, 10, 10], [], 0, 0)
    assert (run.start, run.rates) == (40.0, [10.0, 5.0])


def test_seconds_to_a_loss_lie_between_two_measurements(peers: ModuleType) -> None:
    run = run_of(peers, seconds_per_step=1.0)
    assert run.seconds_to(2.75) == pytest.approx(8.0)
    assert run.seconds_to(9.0) == 7.0
    assert run.seconds_to(0.5) == float("inf")


def test_the_table_says_how_many_times_better_ours_is(peers: ModuleType) -> None:
    results = {
        "bitnet_train": peers.Result([9.0, 4.0, 6.0], run_of(peers, 1.0)),
        "transformers": peers.Result([8.0], run_of(peers, 2.0)),
        "torchao": peers.Result(reason="torchao is not installed"),
    }
    text = io.StringIO()
    Console(width=250, file=text).print(peers.table("pretrain", results))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("│")]
    ours, theirs, missing = ([cell.strip() for cell in line.strip("│").split("│")] for line in lines)
    assert ours[1:3] == ["100 (100 to 100)", "1.00 (1.00 to 1.00)"]
    assert theirs[1:7] == ["50 (50 to 50)", "2.00 (2.00 to 2.00)", "25.0", "1.67", "3", "8.0"]
    assert ours[6] == "9.0; then 5.0 (3.5 to 6.5)"
    assert missing[1] == "not available: torchao is not installed"


def test_what_cannot_run_says_why(peers: ModuleType) -> None:
    assert peers.unavailable(None, False, "cpu") is None
    assert peers.unavailable("json", True, "cpu") == "needs CUDA"
    assert peers.unavailable("json", True, "cuda") is None
    assert peers.unavailable("no_such_package", False, "cpu") == "no_such_package is not installed"


def test_tokens_are_positions_that_predict_their_own_document(peers: ModuleType) -> None:
    """Two documents of 3 and 2 ids in a row, one of 2 in the other: 2 + 1 + 1 predictions."""
    from peers.ours import predicting

    rows = [([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), ([6, 7], [0, 0])]
    arrays = [[torch.tensor(values).numpy() for values in (ids, [1] * len(ids), documents)] for ids, documents in rows]
    batch = collate([TokenRow(*row) for row in arrays], pad_id=0)
    assert predicting(batch) == 4 == int((batch.labels != -100).sum())


def test_the_clock_stops_for_the_held_out_rows(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from peers import clock as clocks
    from peers.turns import STARTED

    save_file({"input_ids": torch.zeros(1, 1), "labels": torch.zeros(1, 1)}, tmp_path / "heldout.safetensors")
    now = [0.0]

    def look(*_: object) -> float:
        now[0] += 50.0
        return 1.5

    monkeypatch.setenv(STARTED, "-3.0")
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(clocks, "held_out_loss", look)
    clock, model = clocks.Clock(str(tmp_path), str(tmp_path), every=2), torch.nn.Linear(1, 1)
    for tokens in (7, 8, 9):
        now[0] += 1.0
        clock.count(tokens)
        clock.step_ended(model)
    assert (clock.ends, clock.tokens, clock.losses) == ([4.0, 5.0, 6.0], [7, 8, 9], [(5.0, 1.5)])


CONTESTANT = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
from peers.turns import wait_for_turn
for step in range(3):
    print("step", step, flush=True)
    if step == int(sys.argv[1]): sys.exit("it broke")
    wait_for_turn()
open(sys.argv[2] + "/result.json", "w").write(
    '{{"ends": [1.0], "tokens": [2], "losses": [[1.0, 2.0]], "host_bytes": 3, "device_bytes": 4}}')
"""


def test_a_process_makes_a_step_per_turn(peers: ModuleType, tmp_path: Path) -> None:
    """Steps are counted by what it printed; between two turns it stands still."""
    process = peers.Process(["-c", CONTESTANT, "-1", str(tmp_path)], tmp_path, environment())
    for steps in (1, 2, 3):
        assert (tmp_path / "log").read_text().count("step") == steps
        if steps < 3:
            process.step()
    run = process.finish()
    assert (run.ends, run.losses, run.bytes) == ([1.0], [(1.0, 2.0)], 4)


def test_a_process_that_breaks_says_why(peers: ModuleType, tmp_path: Path) -> None:
    process = peers.Process(["-c", CONTESTANT, "1", str(tmp_path)], tmp_path, environment())
    with pytest.raises(UserError, match="it broke"):
        process.step()
