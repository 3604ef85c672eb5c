"""Steps that are not finite: which are left out, what the message names, what several ranks agree on."""

import math
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bitnet_train.data.order import MicroBatches
from bitnet_train.errors import RunFailed, UserError
from bitnet_train.training import ranks
from bitnet_train.training.guard import StepGuard

pytestmark = pytest.mark.fault

ORDER = MicroBatches(count=50, seed=0, global_batch_size=8, micro_batch_size=2, steps=9, rank=0, ranks=1)


def guard_after(*losses: float, limit: int = 0) -> StepGuard:
    guard = StepGuard(limit)
    for loss in losses:
        guard.saw(torch.tensor(loss))
    return guard


def test_a_finite_step_passes() -> None:
    assert guard_after(1.0, 2.0).passes(3, 1.0, 3.0, ORDER)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_micro_batch_and_its_samples_are_named(bad: float) -> None:
    samples = ", ".join(map(str, list(ORDER)[3 * 4 + 2]))
    with pytest.raises(RunFailed, match=rf"step 3: the loss of rank 0, micro-batch 2 is {bad} \(samples {samples}\)"):
        guard_after(1.0, 2.0, bad, 1.0).passes(3, math.nan, math.nan, ORDER)


def test_where_only_the_gradient_is_not_finite_the_step_is_named() -> None:
    samples = ", ".join(map(str, ORDER.samples(5)))
    with pytest.raises(RunFailed, match=rf"the gradient's norm is inf, every loss is finite \(samples {samples}\)"):
        guard_after(1.0).passes(5, math.inf, 1.0, ORDER)


def test_a_long_list_is_cut() -> None:
    order = MicroBatches(count=99, seed=0, global_batch_size=80, micro_batch_size=20, steps=9, rank=0, ranks=1)
    with pytest.raises(RunFailed, match=r"and 4 more\); the loss .* and 4 more\); .*; the update") as error:
        guard_after(*[math.nan] * 4).passes(0, math.nan, math.nan, order)
    assert "micro-batch 2" in str(error.value)
    assert "micro-batch 3" not in str(error.value)
    assert " and 1 more; the update was not made" in str(error.value)


def test_so_many_in_a_row_are_left_out() -> None:
    guard = StepGuard(limit=2)
    outcomes = []
    for step, norm in enumerate([math.nan, math.nan, 1.0, math.nan, math.inf]):
        outcomes.append(guard.passes(step, norm, 1.0, ORDER))
    assert outcomes == [False, False, True, False, False]
    assert guard.skipped == [2, 4]
    with pytest.raises(RunFailed, match="step 5"):
        guard.passes(5, math.nan, 1.0, ORDER)


def _raise(error: Exception) -> None:
    raise error


def _on_two_ranks(rank: int, folder: str) -> None:
    """Writes what each rank was told, one file per rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    told: list[str] = []
    full = OSError(28, "No space left on device", "file")
    for error in (UserError("bad"), full, KeyError("ours")):
        try:
            ranks.on_first(partial(_raise, error))
        except Exception as raised:
            told.append(f"{type(raised).__name__}: {raised}")
    told.append(ranks.attempt(partial(_raise, full) if rank == 1 else partial(str)))
    told.append(ranks.attempt(partial(str)))
    guard = guard_after(math.nan if rank == 1 else 1.0)
    try:
        guard.passes(0, math.nan, math.nan, MicroBatches(50, 0, 8, 4, 9, rank, 2))
    except RunFailed as error:
        told.append(str(error))
    Path(folder, str(rank)).write_text("\n".join(told))
    dist.barrier()
    os._exit(0)


def test_several_ranks_agree_on_what_has_failed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_on_two_ranks, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    first, second = ((tmp_path / name).read_text().splitlines() for name in ("0", "1"))
    assert first == second
    assert first[0] == "UserError: bad"
    assert first[1].startswith("OSError: [Errno 28] No space left on device")
    assert first[2] == "RuntimeError: rank 0: KeyError('ours')"
    assert first[3:5] == ["No space left on device: file", ""]
    samples = ", ".join(map(str, MicroBatches(50, 0, 8, 4, 9, 1, 2).micro_batch(0, 0)))
    assert f"the loss of rank 1, micro-batch 0 is nan (samples {samples})" in first[5]
