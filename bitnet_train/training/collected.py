"""Sharded tensors on the first rank, a part of one at a time: what a file of whole tensors is written from."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from threading import Lock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bitnet_train.formats.safetensors_file import LazyTensor
from bitnet_train.training import ranks
from bitnet_train.training.sharding import own_part, rows_of


@contextmanager
def collected(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, LazyTensor]]:
    """Yields, to the first rank, tensors to be read once and in order; the other ranks send it their rows meanwhile.

    No rank holds more than its share and two parts. A reader that fails leaves nobody waiting.
    """
    if ranks.is_first():
        stream = _Stream(tensors.values())
        try:
            yield {name: stream.lazy(tensor) for name, tensor in tensors.items()}
        finally:
            stream.drain()
    else:
        _send(tensors.values())
        yield {}


class _Stream:
    """The parts of tensors in order. A thread may take the next one while another drains what is left."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._parts = chain.from_iterable(map(_parts, tensors))
        self._lock = Lock()

    def lazy(self, tensor: Tensor) -> LazyTensor:
        """The next tensor of the stream."""
        count = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: self._take(count))

    def _take(self, count: int) -> Iterator[Tensor]:
        for _ in range(count):
            part = self._next()
            if part is not None:
                yield part

    def _next(self) -> Tensor | None:
        with self._lock:
            return next(self._parts, None)

    def drain(self) -> None:
        """Takes what nobody has taken."""
        while self._next() is not None:
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
