"""The exact product of int8 matrices: oneDNN (VNNI, AMX) on CPU, int8 tensor cores on CUDA, float32 elsewhere.

A few rows, as generation has them, are multiplied by native.cpp on CPU: float32 copies of all codes, made again for
every token, would take 7 to 80 times as long, and oneDNN somewhat longer for one row. Milliseconds on two cores of a
Xeon with AMX, the shortest of 31, for 13,824 rows of 2,560 codes (2026-11-27):

| rows of a | native.cpp | oneDNN | float32 |
|---|---|---|---|
| 1 | 0.8 | 1.4 | 64 |
| 4 | 1.7 | 1.4 | 84 |
| 16 | 11 | 1.6 | 80 |
"""

import torch
from torch import Tensor

from bitnet_train.autocast import no_autocast
from bitnet_train.kernels import native
from bitnet_train.kernels.processor import HAS_INT8

_FEW = 2 if HAS_INT8 else 16  # rows that native.cpp multiplies


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 `(tokens, in)` and ternary int8 `(out, in)` as int32 `(tokens, out)`, exact for in < 132,000.

    |a . b| <= 127 in < 2^24, so that float32 holds every sum too, in whatever order it is made.
    """
    if 0 < len(a) <= _FEW and a.shape[1] == b.shape[1] and native.available(a, b, dtypes=(torch.int8,)):
        return native.integer_products(a, b)
    if _has_int8_matmul(a, b):
        return torch._int_mm(a, b.t())
    with no_autocast(a):
        return (a.float() @ b.float().t()).int()


def _has_int8_matmul(a: Tensor, b: Tensor) -> bool:
    """CUDA's int8 matmul wants more than 16 rows and multiples of 8; CPU's is wrong for in = 1 (seen in torch 2.13)."""
    if a.device.type == "cuda":
        return a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    return a.device.type == "cpu" and HAS_INT8 and a.shape[0] > 0 and a.shape[1] > 1
