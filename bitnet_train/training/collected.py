"""Sharded tensors on the first rank, a part of one at a time: what a file of whole tensors is written from."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from threading import Condition

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bitnet_train.formats.safetensors_file import LazyTensors, TensorInfo
from bitnet_train.training import ranks
from bitnet_train.training.sharding import own_part, rows_of


@contextmanager
def collected(tensors: Mapping[str, Tensor]) -> Iterator[list[LazyTensors]]:
    """Yields, to the first rank, tensors to be read once and in order; the other ranks send it their rows meanwhile.

    No rank holds more than its share and a few parts. A reader that fails leaves nobody waiting.
    """
    if ranks.is_first():
        stream = _Stream(tensors.values())
        try:
            yield [stream.lazy(name, tensor) for name, tensor in tensors.items()]
        finally:
            stream.drain()
    else:
        _send(tensors.values())
        yield []


class _Stream:
    """The parts of tensors in order. Threads that read several at once each wait for their turn."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._parts = chain.from_iterable(map(_parts, tensors))
        self._turn = Condition()
        self._promised = self._taken = 0

    def lazy(self, name: str, tensor: Tensor) -> LazyTensors:
        """The next tensor of the stream."""
        first, count = self._promised, tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
        self._promised += count
        parts = [partial(self._take, name, number) for number in range(first, first + count)]
        return LazyTensors({name: TensorInfo(tensor.dtype, tuple(tensor.shape))}, parts)

    def _take(self, name: str, number: int) -> dict[str, Tensor]:
        with self._turn:
            self._turn.wait_for(lambda: self._taken == number)
            try:
                return {name: next(self._parts)}
            finally:  # also after an error: whoever waits for its turn must come to know of it
                self._taken += 1
                self._turn.notify_all()

    def drain(self) -> None:
        """Takes what nobody has taken."""
        with self._turn:
            for _ in self._parts:
                pass


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The rows of every rank, in order, on the CPU."""
    yield own_part(tensor).detach().cpu()
    if not isinstance(tensor, DTensor):
        return
    for rank in range(1, tensor.device_mesh.size()):
        part = torch.empty(len(rows_of(tensor, rank)), *tensor.shape[1:], dtype=tensor.dtype)
        if part.numel():
            dist.recv(part, src=rank)
        yield part


def _send(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        part = own_part(tensor).detach().cpu().contiguous()
        if isinstance(tensor, DTensor) and part.numel():
            dist.send(part, dst=0)
