"""The scale of a ternary matrix in the type that a format stores it in.

    |stored - g| <= 2^-8 g          as precise as bfloat16, the coarsest type that is stored

float16 ends at 65504 and has fewer than 8 bits below 1.5e-5: a scale beyond it would become infinity, or 0, or another
scale, and with it every weight of the matrix.
"""

import torch
from torch import Tensor

_PRECISION = 2**-8
_FIRST = 1024


def all_zero(codes: Tensor) -> bool:
    """Whether a matrix is all zero: it has a scale and needs none."""
    codes = codes.reshape(-1)
    return not (codes[:_FIRST].any() or codes[_FIRST:].any())  # the first few tell of nearly every matrix


def rounded_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """g, or 1 / g, float32 of shape (), rounded to `dtype`.

    Raises:
        ValueError: the rounded number is another one.
    """
    stored = scale.to(dtype)
    error = (stored.float() - scale.float()).abs()
    if not (scale > 0 and scale.isfinite() and error <= _PRECISION * scale):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the scale must be a number that {name} holds to 8 bits, got {scale.item():g}, stored as "
            f"{stored.item():g}; choose a wider type"
        )
    return stored
