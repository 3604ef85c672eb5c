"""The order of samples: a permutation per epoch, the same for any number of ranks, from any step on."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.data.order import BlockOrder, MicroBatches, ValidationBatches, permuted, sample_at


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_every_epoch_is_a_permutation(count: int, key: int) -> None:
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [sample_at(number * 100 + i, 100, seed) for i in range(100)]

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_order_is_pinned() -> None:
    """A change here makes every run that resumes read other samples."""
    assert [sample_at(i, 10, 0) for i in range(20)] == [7, 2, 5, 4, 0, 8, 3, 9, 1, 6, 7, 5, 6, 9, 3, 8, 2, 4, 1, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), st.integers(1, 12), st.integers(0, 2**64 - 1))
def test_blocks_are_read_one_after_the_other_by_every_lane(counts: list[int], lanes: int, seed: int) -> None:
    """And every sample comes once per epoch."""
    order, total = BlockOrder(np.array(counts), lanes, seed), sum(counts)
    block_of = np.repeat(np.arange(len(counts)), counts)
    backwards = [order(position) for position in range(2 * total - 1, -1, -1)]
    for epoch in range(2):
        samples = [order(position) for position in range(epoch * total, (epoch + 1) * total)]
        assert samples == backwards[::-1][epoch * total : (epoch + 1) * total]
        assert sorted(samples) == list(range(total))
        line = [block_of[sample] for lane in range(lanes) for sample in samples[lane::lanes]]
        assert sum(a != b for a, b in pairwise(line)) == np.count_nonzero(counts) - 1


def test_order_of_blocks_is_pinned() -> None:
    """As `test_order_is_pinned`."""
    order = BlockOrder(np.array([4, 3, 0, 5]), lanes=4, seed=0)
    assert [order(i) for i in range(24)] == [
        *(4, 9, 8, 2, 5, 11, 10, 1, 6, 7, 3, 0),
        *(11, 10, 4, 0, 7, 9, 5, 2, 8, 6, 1, 3),
    ]


def steps(ranks: int, micro: int, first_step: int = 0) -> list[list[int]]:
    """Samples of every optimizer step, over all ranks, in the order of their positions."""
    orders = [MicroBatches(10, 3, 8, micro, steps=6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for order in orders:
        order.first_step = first_step
    batches = [list(order) for order in orders]
    assert all(len(batch) == len(order) for batch, order in zip(batches, orders, strict=True))
    per_step = orders[0].per_step
    return [
        [sample for m in range(per_step) for rank in range(ranks) for sample in batches[rank][step * per_step + m]]
        for step in range(6 - first_step)
    ]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_and_micro_batches_read_the_same_order(ranks: int, micro: int) -> None:
    expected = [[sample_at(8 * step + i, 10, 3) for i in range(8)] for step in range(6)]
    assert steps(ranks, micro) == expected


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_going_on_reads_the_rest(first_step: int) -> None:
    assert steps(2, 2, first_step) == steps(2, 2)[first_step:]


@given(count=st.integers(1, 60), micro=st.integers(1, 7), ranks=st.integers(1, 5))
def test_validation_rows_count_once_and_ranks_stay_together(count: int, micro: int, ranks: int) -> None:
    dealt = [ValidationBatches(count, micro, rank, ranks) for rank in range(ranks)]
    counted = [row for batches in dealt for i, batch in enumerate(batches) if batches.counts(i) for row in batch]
    assert sorted(counted) == list(range(count))
    assert {len(list(batches)) for batches in dealt} == {len(dealt[0])}
    assert all(batch for batches in dealt for batch in batches)
