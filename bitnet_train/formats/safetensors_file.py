"""safetensors files, read and written a part of a tensor at a time, in one file or in shards with an index.

A file is: the header's length (u64), the header (JSON, padded with spaces), the tensors without gaps, row-major; all
little endian. Source: the safetensors README, section "Format". The library reads; it cannot write what is not wholly
in memory, so the writer is ours.

The library's own reader maps the file: a page fault per page, and what was touched stays resident. Here the bytes of a
part are read.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.parts import ahead, nothing, read_bytes

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor lies: the file, the name of its dtype there, its shape, and its first byte.

    Raises (every method):
        UserError: the file is cut off, or the dtype is none of those that are read here.
    """

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        if self.dtype_name not in _DTYPES:
            raise UserError(
                f"{self.file}: {self.name}: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype_name}"
            )
        return _DTYPES[self.dtype_name]

    def load(self) -> Tensor:
        """All of it, in its stored dtype."""
        return self._read(0, prod(self.shape), self.shape)

    def rows(self, rows: slice) -> Tensor:
        """Some rows of it."""
        size = prod(self.shape[1:])
        return self._read(rows.start * size, rows.stop * size, (-1, *self.shape[1:]))

    def _read(self, first: int, last: int, shape: tuple[int, ...]) -> Tensor:
        start, stop = (self.offset + index * self.dtype.itemsize for index in (first, last))
        return torch.from_numpy(read_bytes(self.file, start, stop)).view(self.dtype).view(shape)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt"):  # checks that header and size fit together
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: must be a whole safetensors file: {error}; copy it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


class LazyTensors(NamedTuple):
    """Tensors that are to be written, made together: every call of `parts` makes the next rows of some of them."""

    infos: Mapping[str, TensorInfo]
    parts: Sequence[Callable[[], Mapping[str, Tensor]]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "LazyTensors":
        """A tensor that is in memory."""
        return cls({name: TensorInfo(tensor.dtype, tuple(tensor.shape))}, [lambda: {name: tensor}])


def write_safetensors(path: Path, tensors: Iterable[LazyTensors]) -> None:
    """Writes a safetensors file with a few parts in memory at a time (metadata {"format": "pt"}).

    The tensors lie as the safetensors library sorts them, wide dtypes first, then by name: every one is then aligned.
    They are made in the order of `tensors`.
    """
    _File.lay_out(path, list(tensors)).fill(lambda name: None)


class _File(NamedTuple):
    """A file of its size with nothing but its header, to be filled: where each tensor begins, and where it ends."""

    path: Path
    tensors: Sequence[LazyTensors]
    infos: Mapping[str, TensorInfo]
    begins: Mapping[str, int]
    ends: Mapping[str, int]

    @classmethod
    def lay_out(cls, path: Path, tensors: Sequence[LazyTensors]) -> "_File":
        """Makes the file."""
        infos = {name: info for made in tensors for name, info in made.infos.items()}
        order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
        offsets = dict(zip(order, accumulate(infos[name].bytes for name in order), strict=True))
        header = _header({name: infos[name] for name in order}, offsets)
        ends = {name: len(header) + end for name, end in offsets.items()}
        with path.open("wb") as file:
            file.write(header)
            file.truncate(max(ends.values(), default=len(header)))
        return cls(path, tensors, infos, {name: end - infos[name].bytes for name, end in ends.items()}, ends)

    def fill(self, written: Callable[[str], object]) -> None:
        """Writes the tensors; `written` is called with each one that can be read from the file."""
        place = dict(self.begins)
        with self.path.open("r+b") as file:
            for part in ahead(chain.from_iterable(made.parts for made in self.tensors)):
                for name, rows in part.items():
                    assert rows.dtype == self.infos[name].dtype, name
                    file.seek(place[name])
                    file.write(rows.detach().reshape(-1).view(torch.uint8).numpy().data)
                    place[name] = file.tell()
                file.flush()
                for name in part:
                    if place[name] == self.ends[name]:
                        written(name)
        assert place == self.ends


def _header(infos: Mapping[str, TensorInfo], ends: Mapping[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, info in infos.items():
        offsets = [ends[name] - info.bytes, ends[name]]
        header[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": info.shape, "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_weights(
    folder: Path,
    tensors: Iterable[LazyTensors],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    written: Callable[[Path, str], object] = nothing,
) -> None:
    """Writes the weights of a model folder: one file, or where they exceed a shard several and their index.

    Args:
        folder: where they go.
        tensors: what makes them.
        max_shard_bytes: size at which they are cut.
        written: called with the folder and each tensor that can be read from it; the index is there from the beginning.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = [_SHARD.format(number=number, count=len(shards)) for number in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    files = [_File.lay_out(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    if len(files) > 1:
        _write_index(folder, files)
    for file in files:
        file.fill(partial(written, folder))


def _write_index(folder: Path, files: Sequence[_File]) -> None:
    index = {
        "metadata": {"total_size": sum(info.bytes for file in files for info in file.infos.values())},
        "weight_map": {name: file.path.name for file in files for name in file.infos},
    }
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[LazyTensors], max_bytes: int) -> list[list[LazyTensors]]:
    """Cuts the list where the next tensors would not fit; those that are larger by themselves have their own shard."""
    shards: list[list[LazyTensors]] = [[]]
    size = 0
    for made in tensors:
        more = sum(info.bytes for info in made.infos.values())
        if shards[-1] and size + more > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(made)
        size += more
    return shards
