"""Parts that threads make: in order, a few ahead, and not one more after a failure."""

import threading

import pytest
import torch

from bitnet_train.formats.parts import ahead, workers


def test_results_come_in_order_and_by_several_threads() -> None:
    meet = threading.Barrier(2, timeout=30)

    def call(number: int) -> int:
        if number < 2:
            meet.wait()  # two calls are under way at once
        return number

    assert list(ahead(lambda n=n: call(n) for n in range(20))) == list(range(20))  # type: ignore[misc]


def test_a_failure_reaches_the_caller_and_ends_the_rest() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("of the third")
        return number

    with pytest.raises(ValueError, match="of the third"):
        list(ahead(lambda n=n: call(n) for n in range(100)))  # type: ignore[misc]
    assert len(begun) < 10


def test_a_worker_computes_alone_and_the_caller_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with workers() as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
        after = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        seen: list[int] = []
        after.start()
        after.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(before)
