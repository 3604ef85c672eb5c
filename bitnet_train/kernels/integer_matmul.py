"""The exact product of int8 matrices: oneDNN (VNNI, AMX) on CPU, int8 tensor cores on CUDA, float32 elsewhere."""

import torch
from torch import Tensor

from bitnet_train.autocast import no_autocast
from bitnet_train.kernels.processor import HAS_INT8


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 `(tokens, in)` and ternary int8 `(out, in)` as int32 `(tokens, out)`, exact for in < 132,000.

    |a . b| <= 127 in < 2^24, so that float32 holds every sum too, in whatever order it is made.
    """
    if _has_int8_matmul(a, b):
        return torch._int_mm(a, b.t())
    with no_autocast(a):
        return (a.float() @ b.float().t()).int()


def _has_int8_matmul(a: Tensor, b: Tensor) -> bool:
    """CUDA's int8 matmul wants more than 16 rows and multiples of 8; CPU's is wrong for in = 1 (seen in torch 2.13)."""
    if a.device.type == "cuda":
        return a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    return a.device.type == "cpu" and HAS_INT8 and a.shape[0] > 0 and a.shape[1] > 1
