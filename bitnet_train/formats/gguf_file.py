"""GGUF files, written a part of a tensor at a time, and read back.

    header         "GGUF", version 3 (u32), number of tensors (u64), number of key-values (u64)
    key-values     key (string), type (u32), value
    tensor infos   name (string), number of dimensions (u32), dimensions (u64 each, innermost first), type (u32),
                   offset from the start of the tensor data (u64)
    padding        to a multiple of general.alignment (32)
    tensor data    each tensor padded to the alignment

    string         length (u64), UTF-8 bytes
    array          type of the elements (u32), their number (u64), the elements

All numbers are little endian. The reader shares nothing with the writer but the numbers of the types, for an export is
verified with it. A test holds the writer to the bytes of the gguf library's, which takes a second for the tokens of a
large vocabulary; the library's reader refuses type 36. Source: ggml, docs/gguf.md.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.gguf_blocks import GGMLType, tensor_bytes
from bitnet_train.formats.parts import ahead, nothing, read_bytes

_ALIGNMENT = 32
_MOST_HEADER = 1 << 26  # bytes; the keys of a vocabulary of 262,144 tokens take 16 MB
_MOST_DIMENSIONS = 4  # ggml's
_VERSION = 3
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _FLOAT64 = 4, 5, 6, 7, 8, 9, 12
_MOST_FLOAT32 = float(np.finfo(np.float32).max)
_INTEGERS = {
    4: (0, 2**32 - 1),
    5: (-(2**31), 2**31 - 1),
    10: (0, 2**64 - 1),
    11: (-(2**63), 2**63 - 1),
}  # least, greatest


class LazyBlocks(NamedTuple):
    """A tensor that is to be written: every call of `parts` makes the next of its bytes; shape `(out, in)`."""

    kind: GGMLType
    shape: tuple[int, ...]
    parts: Sequence[Callable[[], bytes | memoryview]]


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Mapping[str, LazyBlocks],
    written: Callable[[Path, str], object] = nothing,
    whole: Callable[[Path], object] = nothing,
    types: Mapping[str, int] | None = None,
) -> None:
    """Writes a GGUF file with a few parts of tensors in memory at a time; `path` appears when it is whole.

    Args:
        path: the file, replaced if it exists.
        architecture: general.architecture.
        metadata: key-values: str, bool, int (as uint32) or float (as float32), or as a wider type if it must be, or a
            list of one of them (int as int32); an empty list is left out.
        tensors: the tensors by name, in the order of the file.
        written: called with the file, under its temporary name, and each tensor that can be read from it.
        whole: called with the file before it gets its name; the file is removed if this raises.
        types: the numbers of the types of some keys, or of their elements, in place of the usual ones: see
            `GGUFFile.types`.

    Raises:
        UserError: a key holds what GGUF has no type for.
    """
    header = _header(path, architecture, metadata, tensors, types or {})
    with atomic_file(path) as temporary:
        _write(temporary, header, tensors, written)
        whole(temporary)


def _write(
    path: Path, header: bytes, tensors: Mapping[str, LazyBlocks], written: Callable[[Path, str], object]
) -> None:
    data_size = sum(tensor_bytes(kind, shape) + _padding(kind, shape) for kind, shape, _ in tensors.values())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_size)  # who reads what is written so far finds a file as large as it says
        calls = list(_tensor_data(tensors))
        for (ended, _), part in zip(calls, ahead(call for _, call in calls), strict=True):
            file.write(part)
            if ended is not None:
                file.flush()
                written(path, ended)
        assert file.tell() == len(header) + data_size


def _header(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Mapping[str, LazyBlocks],
    types: Mapping[str, int],
) -> bytes:
    """All that comes before the tensor data."""
    pairs = {"general.architecture": architecture, **metadata}
    packed = [_packed_pair(path, key, value, types.get(key)) for key, value in pairs.items() if value != []]
    counts = struct.pack("<IQQ", _VERSION, len(tensors), len(packed))
    header = b"".join([b"GGUF", counts, *packed, *_tensor_infos(tensors)])
    return header + bytes(-len(header) % _ALIGNMENT)


def _tensor_infos(tensors: Mapping[str, LazyBlocks]) -> Iterator[bytes]:
    offset = 0
    for name, (kind, shape, _) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        yield _packed(name) + dimensions + struct.pack("<IQ", int(kind), offset)
        offset += tensor_bytes(kind, shape) + _padding(kind, shape)


def _padding(kind: GGMLType, shape: tuple[int, ...]) -> int:
    return -tensor_bytes(kind, shape) % _ALIGNMENT


def _packed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _packed_pair(path: Path, key: str, value: object, type_: int | None) -> bytes:
    try:
        return _packed(key) + _packed_value(value, type_)
    except (ValueError, struct.error) as error:
        raise UserError(f"{path}: {key}: {error}; the source of this key is damaged") from None


def _packed_value(value: object, type_: int | None = None) -> bytes:
    """The type's number, then the value; the library would take a second for the tokens of a large vocabulary."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed(value)
    if isinstance(value, list):
        code = _type_of(value, _INT32) if type_ is None else type_
        if code == _STRING:
            data = b"".join(map(_packed, value))
        else:
            data = struct.pack(f"<{len(value)}{_SCALARS[code]}", *value)
        return struct.pack("<IIQ", _ARRAY, code, len(value)) + data
    code = _type_of([value], _UINT32) if type_ is None else type_
    return struct.pack(f"<I{_SCALARS[code]}", code, value)


def _type_of(values: Sequence[object], usual: int) -> int:
    """The type that holds these values: the usual one if they fit, else the next that does."""
    kinds = {type(value) for value in values}
    if kinds == {int}:
        numbers = cast(Sequence[int], values)
        for code in (usual, _INT32, *_INTEGERS):
            low, high = _INTEGERS[code]
            if low <= min(numbers) and max(numbers) <= high:
                return code
    if kinds == {float} and any(_MOST_FLOAT32 < abs(value) < inf for value in cast(Sequence[float], values)):
        return _FLOAT64
    codes: dict[type, int] = {bool: _BOOL, float: _FLOAT32, str: _STRING}
    if len(kinds) != 1 or (kind := kinds.pop()) not in codes:
        raise ValueError(
            f"a key must hold a text, a number, a truth value, or a list of one of these, got {values[0]!r}"
        )
    return codes[kind]


def _tensor_data(
    tensors: Mapping[str, LazyBlocks],
) -> Iterator[tuple[str | None, Callable[[], bytes | memoryview]]]:
    """What makes the bytes of every tensor, each padded to the alignment; with the padding the tensor's name."""
    for name, (kind, shape, parts) in tensors.items():
        yield from ((None, part) for part in parts)
        yield name, partial(bytes, _padding(kind, shape))


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape `(out, in)`, number of its type, offset from the start of the file in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


class GGUFFile:
    """A GGUF file: `metadata` and `types` by key, `tensors` by name; a tensor is read when it is asked for.

    Attributes:
        types: the number of each key's type, of an array's that of its elements.

    Raises:
        UserError: the file is missing, no GGUF file of version 3, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                parser = _Parser(file, path.stat().st_size)
                self.metadata, self.tensors = parser.parse()
                self.types: Mapping[str, int] = parser.types
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(
                f"{path}: must be a whole GGUF file of version {_VERSION}: {error}; write it again"
            ) from None

    def kind(self, name: str) -> GGMLType:
        """The type of a tensor.

        Raises:
            UserError: there is no such tensor, or its type is none of those that are written here.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {name!r} is missing; write the file again")
        try:
            return GGMLType(self.tensors[name].kind)
        except ValueError:
            known = ", ".join(f"{kind.name} ({int(kind)})" for kind in GGMLType)
            raise UserError(
                f"{self.path}: {name}: type must be one of {known}, got {self.tensors[name].kind}"
            ) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes of a tensor, uint8, or those from `start` to `stop`.

        Raises:
            UserError: there is no such tensor, its type is unknown here, or the file ends before it does.
        """
        size = tensor_bytes(self.kind(name), self.tensors[name].shape)
        end = self.tensors[name].offset + size
        if end > self.path.stat().st_size:
            raise UserError(
                f"{self.path}: {name}: must end by byte {self.path.stat().st_size}, got {end}; the file is cut off"
            )
        stop = size if stop is None else min(stop, size)
        return read_bytes(self.path, self.tensors[name].offset + start, self.tensors[name].offset + stop)


class _Parser:
    """Reads the parts of a GGUF file before the tensor data, in order."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.types: dict[str, int] = {}

    def parse(self) -> tuple[dict[str, object], dict[str, TensorInfo]]:
        magic, version = self._take(4), self._integer("I")
        if (magic, version) != (b"GGUF", _VERSION):
            raise ValueError(f"it begins with {magic!r} and version {version}")
        tensor_count, pair_count = self._integer("Q"), self._integer("Q")
        metadata = dict(self._pair() for _ in range(pair_count))
        infos = dict(self._tensor_info() for _ in range(tensor_count))
        if sum(prod(info.shape) for info in infos.values()) > 8 * self.size:  # no type has less than a bit for a value
            raise ValueError("its tensors have more values than it has bits")
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & alignment - 1:
            raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
        base = -(-self.file.tell() // alignment) * alignment
        return metadata, {name: TensorInfo(i.shape, i.kind, base + i.offset) for name, i in infos.items()}

    def _take(self, size: int) -> bytes:
        end = self.file.tell() + size
        if end > self.size:
            raise ValueError(f"it ends at byte {self.size}, within its header")
        if end > _MOST_HEADER:
            raise ValueError(f"its header must end by byte {_MOST_HEADER}, got {end}")
        return self.file.read(size)

    def _integer(self, code: str) -> int:
        number: int = self._numbers(code, 1)[0]
        return number

    def _numbers(self, code: str, count: int) -> list[Any]:
        """So many numbers of a type, as Python has them."""
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))

    def _string(self) -> str:
        return self._take(self._integer("Q")).decode()

    def _pair(self) -> tuple[str, object]:
        key, kind = self._string(), self._integer("I")
        if kind != _ARRAY:
            self.types[key] = kind
            return key, self._values(kind, 1)[0]
        self.types[key], count = self._integer("I"), self._integer("Q")
        return key, self._values(self.types[key], count)

    def _values(self, kind: int, count: int) -> list[Any]:
        """So many values of one type; arrays in arrays are read by no runtime."""
        return [self._string() for _ in range(count)] if kind == _STRING else self._numbers(_code_of(kind), count)

    def _tensor_info(self) -> tuple[str, TensorInfo]:
        name = self._string()
        if not 0 < (count := self._integer("I")) <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} must have 1 to {_MOST_DIMENSIONS} dimensions, got {count}")
        dimensions = self._numbers("Q", count)
        kind, offset = self._integer("I"), self._integer("Q")
        return name, TensorInfo(tuple(reversed(dimensions)), kind, offset)


def _code_of(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"the type of a key must be a text, a number, or an array of one of these, got {kind}")
    return _SCALARS[kind]
