"""safetensors files, read and written a part of a tensor at a time, in one file or in shards with an index.

A file is: the header's length (u64), the header (JSON, padded with spaces), the tensors without gaps, row-major; all
little endian. Source: the safetensors README, section "Format". The library reads; it cannot write what is not wholly
in memory, so the writer is ours.

A reader maps the file, and what was touched of it stays resident while it is open. So it is opened for each part
(0.2 ms) and closed again: memory holds one part, and not the file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.parts import ahead, rows_per_part

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class _OpenFile(Protocol):
    """What is used of `safetensors.safe_open`, which has no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> Any: ...
    def get_tensor(self, name: str) -> Tensor: ...


@contextmanager
def _opened(path: Path) -> Iterator[_OpenFile]:
    try:
        with safe_open(path, framework="pt") as file:
            yield cast(_OpenFile, file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: must be a whole safetensors file: {error}; copy it again") from None


def tensor_names(path: Path) -> list[str]:
    """The names in a file.

    Raises (as every function that reads):
        UserError: the file is damaged.
    """
    with _opened(path) as file:
        return list(file.keys())


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of a tensor, read from the header."""
    with _opened(path) as file:
        return tuple(file.get_slice(name).get_shape())


def tensor_dtype(path: Path, name: str) -> torch.dtype:
    """The dtype of a tensor, read from the header."""
    with _opened(path) as file:
        stored = file.get_slice(name).get_dtype()
    if stored not in _DTYPES:
        raise UserError(f"{path}: {name}: dtype must be one of {', '.join(_DTYPES)}, got {stored}")
    return _DTYPES[stored]


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor in its stored dtype."""
    with _opened(path) as file:
        return file.get_tensor(name)


def read_parts(path: Path, name: str) -> Iterator[Tensor]:
    """A tensor by blocks of rows, in order."""
    shape = tensor_shape(path, name)
    step = rows_per_part(shape)
    for first in range(0, shape[0], step):
        with _opened(path) as file:
            part: Tensor = file.get_slice(name)[first : first + step]
        yield part


class LazyTensor(NamedTuple):
    """A tensor that is to be written: `parts` makes its rows, in order, when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a safetensors file with two parts of a tensor in memory at a time (metadata {"format": "pt"}).

    The tensors lie as the safetensors library sorts them, wide dtypes first, then by name: every one is then aligned.
    They are made in the order of `tensors`, so that neighbours there can share their work.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ends = dict(zip(order, accumulate(tensors[name].bytes for name in order), strict=True))
    header = _header({name: tensors[name] for name in order}, ends)
    with path.open("wb") as file:
        file.write(header)
        made = ((name, part) for name, tensor in tensors.items() for part in tensor.parts())
        for name, parts in groupby(ahead(made), key=itemgetter(0)):
            file.seek(len(header) + ends[name] - tensors[name].bytes)
            for _, part in parts:
                assert part.dtype == tensors[name].dtype, name
                file.write(part.detach().reshape(-1).view(torch.uint8).numpy().data)
            assert file.tell() == len(header) + ends[name], name


def _header(tensors: Mapping[str, LazyTensor], ends: Mapping[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        offsets = [ends[name] - tensor.bytes, ends[name]]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the weights of a model folder: one file, or where they exceed a shard several and their index."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SHARD.format(number=number, count=len(shards))
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Cuts the list of tensors where the next one would not fit; one that is larger by itself has its own shard."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    return shards
