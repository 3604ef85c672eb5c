"""What a file of whole tensors is written from: parts in order, whoever asks first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bitnet_train.training import collected as module
from bitnet_train.training.collected import collected

TENSORS = {name: torch.full((2, 3), value) for value, name in enumerate("abc")}


def test_a_part_waits_for_those_before_it() -> None:
    with collected(TENSORS) as weights, ThreadPoolExecutor(len(weights)) as pool:
        reads = [part for tensors in weights for part in tensors.parts]
        futures = [pool.submit(read) for read in reversed(reads)]
        found: dict[str, Tensor] = {}
        for future in futures:
            found |= future.result(timeout=60)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_part_that_cannot_be_had_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensor: Tensor) -> Iterator[Tensor]:
        raise ConnectionError("a rank is gone")
        yield tensor

    monkeypatch.setattr(module, "_parts", broken)
    with ThreadPoolExecutor(len(TENSORS)) as pool, collected(TENSORS) as weights:
        futures = [pool.submit(part) for tensors in weights for part in tensors.parts]
        with pytest.raises(ConnectionError, match="a rank is gone"):
            futures[0].result(timeout=60)
        assert all(isinstance(future.exception(timeout=60), Exception) for future in futures[1:])
