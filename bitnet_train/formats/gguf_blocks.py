"""Tensors as GGUF stores them: the three float types, and I2_S, the ternary type of bitnet.cpp.

I2_S (ggml type 36) holds a matrix of n codes and one scale in n / 4 + 32 bytes. The rows follow each other; the codes,
plus one (0, 1, 2 for -1, 0, 1), are cut into blocks of 128, and a block c[0..127] is 32 bytes:

    byte p = c[p] << 6 | c[p + 32] << 4 | c[p + 64] << 2 | c[p + 96]        p = 0..31

    offset        size     content
    0             n / 4    the blocks
    n / 4         4        g, float32, little endian: weight ~ code * g
    n / 4 + 4     28       zeros

A row must be a multiple of 128 codes, for a kernel reads it by whole blocks.

Source: microsoft/BitNet, src/ggml-bitnet-mad.cpp, `quantize_i2_s`. It takes max |w| for g and the sign for the code: it
expects weights that are ternary already, and its bytes are then these.
"""

import struct
from enum import IntEnum
from math import prod

import torch
from torch import Tensor

I2_S_BLOCK = 128
I2_S_TAIL = 32  # bytes after the blocks: the scale and its padding


class GGMLType(IntEnum):
    """The numbers of the tensor types that are written here; 36 is bitnet.cpp's own, which the gguf library lacks."""

    F32 = 0
    F16 = 1
    BF16 = 30
    I2_S = 36


FLOAT_TYPES = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def tensor_bytes(kind: GGMLType, shape: tuple[int, ...]) -> int:
    """The size in bytes of a tensor of this type and shape (row-major, `(out, in)` for a matrix).

    Raises:
        ValueError: the row length does not fit the blocks of the type.
    """
    if kind in FLOAT_TYPES:
        return prod(shape) * FLOAT_TYPES[kind].itemsize
    if shape[-1] % I2_S_BLOCK:
        raise ValueError(f"the row length must be a multiple of {I2_S_BLOCK} for I2_S, got {shape[-1]}")
    return prod(shape) // 4 + I2_S_TAIL


def pack_float(values: Tensor, kind: GGMLType) -> bytes:
    """Values of any shape and floating dtype as F32, F16 or BF16, row-major, little endian.

    Raises:
        ValueError: a finite value is beyond the range of the type.
    """
    stored = values.detach().to(FLOAT_TYPES[kind])
    if not torch.isfinite(stored).all():
        largest = values.abs().max().item()
        raise ValueError(f"every value must be within the range of {kind.name}, got a magnitude of {largest:g}")
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()


def unpack_float(data: bytes, kind: GGMLType, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_float`: a tensor of the stored dtype and the given shape."""
    return torch.frombuffer(bytearray(data), dtype=FLOAT_TYPES[kind]).reshape(shape)


def pack_i2_s(codes: Tensor, scale: float) -> bytes:
    """Codes int8 `(out, in)` in {-1, 0, 1} and their scale g as I2_S; the input is left as it is.

    Raises:
        ValueError: in is no multiple of 128.
    """
    size = tensor_bytes(GGMLType.I2_S, tuple(codes.shape))
    blocks = codes.add(1).to(torch.uint8).reshape(-1, 4, I2_S_BLOCK // 4)
    packed = blocks[:, 0] << 6 | blocks[:, 1] << 4 | blocks[:, 2] << 2 | blocks[:, 3]
    return (packed.numpy().tobytes() + struct.pack("<f", scale)).ljust(size, b"\0")


def unpack_i2_s(data: bytes, shape: tuple[int, ...]) -> tuple[Tensor, float]:
    """Inverse of `pack_i2_s`: codes int8 of the given shape `(out, in)`, and the scale.

    Raises:
        ValueError: the size does not fit the shape, or a pair of bits is 3.
    """
    size = tensor_bytes(GGMLType.I2_S, shape)
    if len(data) != size:
        raise ValueError(f"an I2_S tensor of shape {shape} has {size} bytes, got {len(data)}")
    packed = torch.frombuffer(bytearray(data[:-I2_S_TAIL]), dtype=torch.uint8).reshape(-1, 1, I2_S_BLOCK // 4)
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8).reshape(4, 1)
    codes = ((packed >> shifts) & 3).to(torch.int8).reshape(shape) - 1
    if codes.numel() and codes.max() > 1:
        raise ValueError("every two bits of an I2_S tensor must be 0, 1 or 2, got 3")
    return codes, struct.unpack_from("<f", data, size - I2_S_TAIL)[0]
