"""The three ternary types of GGUF: codes and one scale in, bytes out, and back.

The rows of a matrix follow each other and are cut into blocks; c is a code plus one: 0, 1, 2 for -1, 0, 1. The scale is
`weight ~ code * scale`, and little endian.

    I2_S     128 codes, 32 bytes     byte p = c[p] << 6 | c[p + 32] << 4 | c[p + 64] << 2 | c[p + 96]      p = 0..31
             after all blocks: the scale (float32) and 28 zeros

    TQ2_0    256 codes, 66 bytes     two halves of 128 codes, 32 bytes each:
                                     byte p = c[p] | c[p + 32] << 2 | c[p + 64] << 4 | c[p + 96] << 6      p = 0..31
                                     then the scale (float16)

    TQ1_0    256 codes, 54 bytes     a byte holds the five base-3 digits of v, as ceil(v 256 / 243):
                                     v = 81 c[p] + 27 c[p + n] + 9 c[p + 2n] + 3 c[p + 3n] + c[p + 4n]
                                     codes 0..159 in 32 bytes (n = 32), 160..239 in 16 (n = 16), 240..255 in 4 (n = 4,
                                     no last term); then the scale (float16)

llama.cpp takes a block's largest magnitude for its scale; here every block has the matrix's, also one of zeros.

Source: microsoft/BitNet, src/ggml-bitnet-mad.cpp, `quantize_i2_s` (fed with ternary weights it writes these bytes);
llama.cpp, ggml-quants.c, `quantize_row_tq1_0_ref` and `quantize_row_tq2_0_ref`.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet_train.formats.gguf_blocks import GGMLType, tensor_bytes
from bitnet_train.formats.packing import four_in_a_byte, four_of_a_byte

_I2_S_TAIL = 32
_TQ1_0_PARTS = ((5, 32), (5, 16), (4, 4))  # digits of a byte, bytes: 160, 80 and 16 codes
_POWERS = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)


class Ternary(NamedTuple):
    """Codes int8 `(out, in)` in {-1, 0, 1} and their scale, as a type of GGUF holds them."""

    codes: Tensor
    scale: float


def pack_ternary_blocks(kind: GGMLType, codes: Tensor, scale: float) -> memoryview:
    """Codes int8 `(out, in)` and their scale as TQ1_0, TQ2_0 or I2_S; the input is left as it is.

    Raises:
        ValueError: in is no multiple of the type's block, or the scale is beyond the type's range.
    """
    tensor_bytes(kind, tuple(codes.shape))
    return _TYPES[kind].pack(codes, scale)


def unpack_ternary_blocks(kind: GGMLType, data: np.ndarray, shape: tuple[int, ...]) -> Ternary:
    """Inverse of `pack_ternary_blocks`, for bytes in uint8 of a matrix of the given shape `(out, in)`.

    Raises:
        ValueError: the size does not fit the shape, the bytes are no codes, or the blocks differ in their scale.
    """
    size = tensor_bytes(kind, shape)
    if len(data) != size:
        raise ValueError(f"a tensor of type {kind.name} and shape {shape} has {size} bytes, got {len(data)}")
    codes, scale = _TYPES[kind].unpack(torch.from_numpy(data))
    return Ternary(codes.reshape(shape), scale)


def _pack_i2_s(codes: Tensor, scale: float) -> memoryview:
    packed = four_in_a_byte(codes.reshape(-1, 4, 32), descending=True)
    tail = bytearray(struct.pack("<f", scale).ljust(_I2_S_TAIL, b"\0"))
    return torch.cat((packed.view(-1), torch.frombuffer(tail, dtype=torch.uint8))).numpy().data


def _unpack_i2_s(data: Tensor) -> tuple[Tensor, float]:
    packed, tail = data.tensor_split((-_I2_S_TAIL,))
    (scale,) = struct.unpack_from("<f", tail.numpy().data)
    return four_of_a_byte(packed.view(-1, 32), descending=True), scale


def _pack_tq2_0(codes: Tensor, scale: float) -> memoryview:
    packed = four_in_a_byte(codes.reshape(-1, 4, 32))
    return _with_scale(packed.reshape(-1, 64), scale)


def _unpack_tq2_0(data: Tensor) -> tuple[Tensor, float]:
    packed, scale = _without_scale(data, 64)
    return four_of_a_byte(packed.reshape(-1, 32)), scale


def _pack_tq1_0(codes: Tensor, scale: float) -> memoryview:
    parts = codes.add(1).reshape(-1, 256).split([digits * size for digits, size in _TQ1_0_PARTS], dim=1)
    values = []
    for part, (digits, size) in zip(parts, _TQ1_0_PARTS, strict=True):
        v = (part.int().reshape(-1, digits, size) * _POWERS[:digits, None]).sum(dim=1)
        values.append((v * 256 + 242) // 243)
    return _with_scale(torch.cat(values, dim=1).to(torch.uint8), scale)


def _unpack_tq1_0(data: Tensor) -> tuple[Tensor, float]:
    packed, scale = _without_scale(data, 52)
    codes = []
    for part, (digits, size) in zip(
        packed.int().split([size for _, size in _TQ1_0_PARTS], 1), _TQ1_0_PARTS, strict=True
    ):
        shifted = part[:, None] * _POWERS.flip(0)[:digits, None] & 255  # the fraction v / 243 without its first digits
        codes.append((shifted * 3 >> 8).reshape(-1, digits * size))
    return torch.cat(codes, dim=1).to(torch.int8) - 1, scale


def _with_scale(packed: Tensor, scale: float) -> memoryview:
    """Each block, uint8 `(blocks, bytes)`, followed by the scale in float16."""
    half = torch.tensor([scale]).half()
    if not half.isfinite():
        raise ValueError(f"the scale must be within the range of F16, got {scale:g}")
    return torch.cat((packed, half.view(torch.uint8).expand(len(packed), 2)), dim=1).reshape(-1).numpy().data


def _without_scale(data: Tensor, size: int) -> tuple[Tensor, float]:
    """Inverse of `_with_scale`: the blocks uint8 `(blocks, size)`, and the scale that they share."""
    blocks = data.reshape(-1, size + 2)
    scales = blocks[:, size:].contiguous().view(torch.float16)
    if (scales != scales[0]).any():
        raise ValueError("every block must have the matrix's scale, got several; the file was written elsewhere")
    return blocks[:, :size], float(scales[0])


class _Type(NamedTuple):
    pack: Callable[[Tensor, float], memoryview]
    unpack: Callable[[Tensor], tuple[Tensor, float]]


_TYPES = {
    GGMLType.I2_S: _Type(_pack_i2_s, _unpack_i2_s),
    GGMLType.TQ1_0: _Type(_pack_tq1_0, _unpack_tq1_0),
    GGMLType.TQ2_0: _Type(_pack_tq2_0, _unpack_tq2_0),
}
TERNARY_TYPES = frozenset(_TYPES)
