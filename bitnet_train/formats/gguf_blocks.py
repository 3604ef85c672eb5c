"""Tensors as GGUF stores them: the types, their sizes, and the three float types.

    type     number   values of a block   bytes of a block   bytes after the blocks
    F32         0            1                   4                    0
    F16         1            1                   2                    0
    BF16       30            1                   2                    0
    TQ1_0      34          256                  54                    0
    TQ2_0      35          256                  66                    0
    I2_S       36          128                  32                   32

A row is cut into whole blocks, for a kernel reads it by blocks. The ternary types are `gguf_ternary`'s. Source: ggml.h,
ggml-common.h; I2_S is bitnet.cpp's own type, whose number the gguf library does not know.
"""

from enum import IntEnum
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class GGMLType(IntEnum):
    """The numbers of the tensor types that are written here."""

    F32 = 0
    F16 = 1
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    I2_S = 36


class _Layout(NamedTuple):
    values: int
    bytes: int
    tail: int = 0


FLOAT_TYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
SCALE_TYPES = {
    **FLOAT_TYPES,
    GGMLType.I2_S: torch.float32,
    GGMLType.TQ1_0: torch.float16,
    GGMLType.TQ2_0: torch.float16,
}
_LAYOUTS = {
    **{kind: _Layout(1, dtype.itemsize) for kind, dtype in FLOAT_TYPES.items()},
    GGMLType.TQ1_0: _Layout(256, 54),
    GGMLType.TQ2_0: _Layout(256, 66),
    GGMLType.I2_S: _Layout(128, 32, 32),
}


def tensor_bytes(kind: GGMLType, shape: tuple[int, ...]) -> int:
    """The size in bytes of a tensor of this type and shape (row-major, `(out, in)` for a matrix).

    Raises:
        ValueError: the row length does not fit the blocks of the type.
    """
    layout = _LAYOUTS[kind]
    if shape[-1] % layout.values:
        raise ValueError(f"the row length must be a multiple of {layout.values} for {kind.name}, got {shape[-1]}")
    return prod(shape) // layout.values * layout.bytes + layout.tail


def pack_float(values: Tensor, kind: GGMLType) -> memoryview:
    """Values of any shape and floating dtype as F32, F16 or BF16, row-major, little endian: bytes, not copied again.

    Raises:
        ValueError: a finite value is beyond the range of the type, or all become 0.
    """
    stored = values.detach().to(FLOAT_TYPES[kind])
    low, high = stored.aminmax()
    if low == high == 0 and values.any():
        largest = values.abs().max().item()
        raise ValueError(
            f"values must not all become 0 in {kind.name}, got magnitudes up to {largest:g}; choose a wider type"
        )
    if not torch.isfinite(torch.stack((low, high))).all():
        largest = values.abs().max().item()
        raise ValueError(f"every value must be within the range of {kind.name}, got a magnitude of {largest:g}")
    return stored.reshape(-1).view(torch.uint8).numpy().data


def unpack_float(data: np.ndarray, kind: GGMLType, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_float` for bytes in uint8: a tensor of the stored dtype and the given shape."""
    return torch.from_numpy(data).view(FLOAT_TYPES[kind]).reshape(shape)
