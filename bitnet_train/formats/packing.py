"""Four ternary codes in one byte, as transformers stores a BitNet weight.

    R = out / 4          byte[r, i] = sum over k = 0..3 of (codes[r + k R, i] + 1) << 2k

So byte row r holds the rows r, r + R, r + 2R and r + 3R of the matrix, the first in the two lowest bits. A code is
stored plus one: 0, 1, 2 for -1, 0, 1; the bit pattern 3 never occurs.

Source: transformers 5.23, integrations/bitnet.py (`pack_weights`, which changes its input; this one does not).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def four_in_a_byte(codes: Sequence[Tensor]) -> Tensor:
    """sum over k of (codes[k] + 1) << 2k as uint8, for four tensors of codes int8 and of one shape.

    Written modulo 256 as 85 + codes[0] + 4 (codes[1] + 4 (codes[2] + 4 codes[3])), which needs no wider type.
    """
    first, second, third, fourth = (code.view(torch.uint8) for code in codes)
    packed = fourth * 4
    packed.add_(third).mul_(4).add_(second).mul_(4).add_(first).add_(_ALL_ONES)
    return packed


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes int8 `(out, in)` in {-1, 0, 1} to uint8 `(out / 4, in)`; the input is left as it is.

    Raises:
        ValueError: out is no multiple of 4.
    """
    shape = packed_shape(tuple(codes.shape))
    return four_in_a_byte(codes.reshape(VALUES_PER_BYTE, *shape).unbind())


def unpack_ternary(packed: Tensor) -> Tensor:
    """Inverse of `pack_ternary`: uint8 `(out / 4, in)` to codes int8 `(out, in)`.

    Raises:
        ValueError: a pair of bits is 3, so that the bytes are no packed codes.
    """
    codes = torch.cat([(packed >> 2 * k) & 3 for k in range(VALUES_PER_BYTE)]).view(torch.int8).sub_(1)
    if codes.numel() and codes.max() > 1:
        raise ValueError("every two bits of a packed weight must be 0, 1 or 2, got 3")
    return codes
