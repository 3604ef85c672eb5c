"""Four ternary codes in one byte, as transformers stores a BitNet weight.

    R = out / 4          byte[r, i] = sum over k = 0..3 of (codes[r + k R, i] + 1) << 2k

So byte row r holds the rows r, r + R, r + 2R and r + 3R of the matrix, the first in the two lowest bits. A code is
stored plus one: 0, 1, 2 for -1, 0, 1; the bit pattern 3 never occurs.

Source: transformers 5.23, integrations/bitnet.py (`pack_weights`, which changes its input; this one does not).
"""

import torch
from torch import Tensor

from bitnet_train.kernels import native

VALUES_PER_BYTE = 4
_ALL_ONES = 0b01_01_01_01  # the byte of four zero codes


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the packed form of a matrix: `(out, in)` to `(out / 4, in)`.

    Raises:
        ValueError: out is no multiple of 4.
    """
    rows, columns = shape
    if rows % VALUES_PER_BYTE:
        raise ValueError(f"the number of rows must be a multiple of {VALUES_PER_BYTE} to be packed, got {rows}")
    return rows // VALUES_PER_BYTE, columns


def four_in_a_byte(codes: Tensor, descending: bool = False) -> Tensor:
    """sum over k of (codes[b, k, i] + 1) << 2k: int8 `(blocks, 4, width)` to uint8 `(blocks, width)`.

    `descending` puts the first code into the highest bits, << 6 - 2k. Written modulo 256 as 85 + c0 + 4 (c1 + 4 (c2 +
    4 c3)), which needs no wider type.
    """
    codes = codes.contiguous()
    if native.available(codes, dtypes=(torch.int8,)):
        return native.pack_ternary(codes, descending)
    first, second, third, fourth = codes.view(torch.uint8).unbind(1)[:: -1 if descending else 1]
    packed = fourth * 4
    return packed.add_(third).mul_(4).add_(second).mul_(4).add_(first).add_(_ALL_ONES)


def four_of_a_byte(packed: Tensor, descending: bool = False) -> Tensor:
    """Inverse of `four_in_a_byte`: uint8 `(blocks, width)` to int8 `(blocks, 4, width)`.

    Raises:
        ValueError: a pair of bits is 3, so that the bytes are no packed codes.
    """
    packed = packed.contiguous()
    if native.available(packed, dtypes=(torch.uint8,)):
        codes, bad = native.unpack_ternary(packed, descending)
    else:
        shifts = torch.tensor([6, 4, 2, 0] if descending else [0, 2, 4, 6], dtype=torch.uint8)[:, None]
        codes = (packed[:, None] >> shifts & 3).view(torch.int8).sub_(1)
        bad = int(codes.numel() and codes.max() > 1)
    if bad:
        raise ValueError("every two bits of packed codes must be 0, 1 or 2, got 3")
    return codes


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes int8 `(out, in)` in {-1, 0, 1} to uint8 `(out / 4, in)`; the input is left as it is.

    Raises:
        ValueError: out is no multiple of 4.
    """
    shape = packed_shape(tuple(codes.shape))
    return four_in_a_byte(codes.reshape(1, VALUES_PER_BYTE, -1)).view(shape)


def unpack_ternary(packed: Tensor) -> Tensor:
    """Inverse of `pack_ternary`: uint8 `(out / 4, in)` to codes int8 `(out, in)`; ValueError as `four_of_a_byte`."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"packed codes must be a matrix of U8, got {packed.dtype} of shape {tuple(packed.shape)}")
    return four_of_a_byte(packed.reshape(1, -1)).view(VALUES_PER_BYTE * packed.shape[0], packed.shape[1])
