"""The programs of triton_kernels.py on CUDA tensors; torch computes the same, slower, where Triton cannot.

BITNET_TRAIN_NATIVE=0 in the environment turns them off, and the C++ passes with them. A program is compiled when it is
first met with a new shape or dtype, and kept in Triton's cache (~/.triton). The product is in `gpu_product`.
Triton comes with torch's CUDA builds and needs a C compiler and Python's headers.
"""

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitnet_train.kernels.tensors import ordinary, rows_of_heads

logger = logging.getLogger(__name__)

DEVICE = "cuda"
ROUNDING = {"enable_fp_fusion": False}  # of every program: a * b + c is two roundings, as in quant.py
MOST_STACKED = 3  # matrices that are quantised together: queries, keys, values
LARGEST_ROW = 1 << 14  # features that a program holds at once
ROW_BLOCKS = 512  # partial sums of a sum over rows: a few for each multiprocessor, whatever the device
_PART = 1024  # of a row or an array, of a program that needs no whole rows
_VOCABULARY_PART = 4096
_STAGED = 48 << 10  # bytes of a row that waits in shared memory, of which every device has 99 KB
_MOST_FOLDED = 128  # columns that `absolute_sums` folds unevenly: Triton takes minutes to compile wide gathers


def available(*tensors: Tensor | None, size: int = 1) -> bool:
    """True where the programs can work on these tensors, in rows of `size` features: outside a compiled graph."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    return ordinary(tensors, DEVICE) and size <= LARGEST_ROW and all(map(capable, devices)) and _installed()


def capable(device: torch.device) -> bool:
    """Whether a CUDA device is the current one, where Triton runs, and has bfloat16 and int8: Nvidia's since Ampere."""
    return device.type != "cuda" or (
        device.index == torch.cuda.current_device()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _installed() -> bool:
    off = os.environ.get("BITNET_TRAIN_NATIVE") == "0"
    found = importlib.util.find_spec("triton") is not None and _compiles()
    if off or not found:
        logger.info("the Triton programs are off: the same is computed by torch, slower")
    return found and not off


def _compiles() -> bool:
    """Whether a C compiler and Python's headers are there, with which Triton makes what calls its programs."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else None  # Debian's, as in Triton
    headers = sysconfig.get_path("include", scheme) if scheme else sysconfig.get_path("include")
    return any(map(shutil.which, compilers)) and Path(headers, "Python.h").is_file()


@functools.cache
def _programs() -> ModuleType:
    """triton_kernels, imported when first used: Triton takes a second."""
    from bitnet_train.kernels import triton_kernels

    return triton_kernels


def launch(program: str, grid: Any, *arguments: Any, **options: int) -> None:
    """Runs a program of triton_kernels."""
    getattr(_programs(), program)[grid](*arguments, **ROUNDING, **options)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _warps(block: int) -> int:
    """Warps of a program that holds `block` float32 in registers: 16 for each thread, up to 16 warps."""
    return min(16, max(1, block // 512))


def vector(values: Tensor | None, size: int) -> Tensor | None:
    """A gain or a bias as the programs read it: float32, one value per feature."""
    return None if values is None else values.float().expand(size).contiguous()


def quantize(x: Tensor, weight: Tensor | None, eps: float, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 codes of RMSNorm(source(x)), see `fused.quantize`: `(tokens, width)` to codes, scale and rms."""
    x = x.contiguous()
    tokens, size = len(x), x.shape[1] if activation is None else x.shape[1] // 2
    codes = torch.empty(tokens, size, dtype=torch.int8, device=x.device)
    scale, rms = torch.empty(2, tokens, 1, dtype=torch.float32, device=x.device).unbind()
    block, weight = _power_of_two(size), vector(weight, size)
    arguments = (x, weight, codes, scale, rms, size, eps, activation, block)
    launch("quantize", (tokens,), *arguments, num_warps=_warps(block))
    return codes, scale, rms


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rms: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm(source(x)) for x and for the gain, see `fused.norm_backward`."""
    x, grad = x.contiguous(), grad.contiguous()
    tokens, size = grad.shape
    blocks = max(1, min(ROW_BLOCKS, tokens))
    grad_x, partial = torch.empty_like(x), torch.empty(blocks, size, dtype=torch.float32, device=x.device)
    height, block = -(-tokens // blocks), _power_of_two(size)
    arguments = (grad, x, vector(weight, size), rms, grad_x, partial, tokens, size, height, activation)
    launch("norm_backward", (blocks,), *arguments, _stages(block, x, grad), block, num_warps=_warps(block))
    return grad_x, partial.sum(dim=0)


def _stages(block: int, x: Tensor, grad: Tensor) -> int:
    """2 where two rows of x and of the gradient fit the shared memory of every device, rounded up to `block`."""
    row = block * (x.shape[1] // grad.shape[1] * x.element_size() + grad.element_size())
    return 2 if row <= _STAGED else 1


def expand(codes: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * factor in `dtype`: int8 `(rows, size)` and float32 `(rows,)` or `(rows, 1)` to `(rows, size)`."""
    rows, size = codes.shape
    y = torch.empty(rows, size, dtype=dtype, device=codes.device)
    launch("expand", (rows, -(-size // _PART)), codes.contiguous(), factor.contiguous(), y, size, _PART)
    return y


def folds(size: int) -> bool:
    """Whether `absolute_sums` is for rows of this size: a power of two times a small number."""
    return 0 < size <= _MOST_FOLDED * (size & -size)


def absolute_sums(rows: Tensor) -> Tensor:
    """sum |w| of every row `(rows, size)`, float64 `(rows,)`, in the order of `quant.row_sums`: to its last bit."""
    matrices = [rows.contiguous()]
    return _absolute_sums(matrices, _bounds(matrices))


def _absolute_sums(matrices: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    """The same of up to three contiguous matrices below each other; `bounds`: the first row of each, and the end."""
    size = matrices[0].shape[1]
    sums = torch.empty(bounds[3], dtype=torch.float64, device=matrices[0].device)
    halvings = (size & -size).bit_length() - 1
    block = _power_of_two(size >> halvings)
    arguments = (*_three(matrices), sums, *bounds[1:3], size, size >> halvings, halvings, block)
    launch("absolute_sums", (bounds[3],), *arguments, num_warps=_warps(2 * block << halvings))
    return sums


def _three(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """For programs that take three; the last one again has no rows of its own."""
    return [*matrices, matrices[-1], matrices[-1]][:MOST_STACKED]


def stacks(weights: Sequence[Tensor]) -> bool:
    """Whether `stack` can quantise these weights: up to three matrices of one width and dtype."""
    first = weights[0]
    return (
        len(weights) <= MOST_STACKED
        and all(w.ndim == 2 and w.shape[1] == first.shape[1] and w.dtype == first.dtype and len(w) for w in weights)
        and available(*weights, size=first.shape[1])
        and folds(first.shape[1])
    )


def _bounds(matrices: Sequence[Tensor]) -> list[int]:
    bounds = [0, *accumulate(map(len, matrices))]
    return bounds + bounds[-1:] * (MOST_STACKED + 1 - len(bounds))


def absmeans(matrices: Sequence[Tensor]) -> Tensor:
    """g of up to three contiguous matrices that `stacks` takes, see `quant.absmean`: float32, the first so many."""
    bounds, size = _bounds(matrices), matrices[0].shape[1]
    sums = _absolute_sums(matrices, bounds)
    scales = torch.empty(MOST_STACKED, dtype=torch.float32, device=sums.device)
    launch("absmeans", (len(matrices),), sums, scales, *bounds[1:], size, _PART)
    return scales


def stack(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ternary codes int8 `(out, in)` of weights below each other, and the scale of every row, float32 `(out,)`.

    In three launches: a layer has seven weights, and its host would else launch fifty times for them.
    """
    matrices = [weight.detach().contiguous() for weight in weights]
    bounds, scales, size = _bounds(matrices), absmeans(matrices), matrices[0].shape[1]
    out = bounds[-1]
    codes = torch.empty(out, size, dtype=torch.int8, device=scales.device)
    column = torch.empty(out, dtype=torch.float32, device=scales.device)
    arguments = (*_three(matrices), scales, codes, column, *bounds[1:3], size, _PART)
    launch("stacked_codes", (out, -(-size // _PART)), *arguments)
    return codes, column


def ternary_codes(weight: Tensor, half: Tensor) -> Tensor:
    """-1, 0 or 1 as int8: the comparison of weights with -half and half, float32, shape ()."""
    weight = weight.contiguous()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    launch("ternary_codes", (-(-weight.numel() // _PART),), weight, half, codes, weight.numel(), _PART)
    return codes


def log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels under logits `(rows, vocab)`, and the log-sum-exp, float32 `(rows,)` each.

    A label outside [0, vocab) has log-probability NaN: to raise, the host would have to wait for the device.
    """
    rows, vocab = logits.shape
    logps, lse = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind()
    arguments = (logits.contiguous(), labels.contiguous(), logps, lse, vocab, _VOCABULARY_PART)
    launch("log_likelihood", (rows,), *arguments, num_warps=8)
    return logps, lse


def likelihood_gradient_(logits: Tensor, labels: Tensor, lse: Tensor, p_factor: Tensor, label_factor: Tensor) -> None:
    """Puts softmax * p_factor - onehot * label_factor in the place of the logits; factors float32 `(rows,)`.

    Raises:
        ValueError: the logits are not contiguous.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits are worked on in place and must be contiguous, got strides {logits.stride()}")
    rows, vocab = logits.shape
    arguments = (logits, labels.contiguous(), lse, p_factor, label_factor, vocab, _VOCABULARY_PART)
    launch("likelihood_gradient", (rows, -(-vocab // _VOCABULARY_PART)), *arguments, num_warps=8)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turns heads by sign times an angle, see `model.rope.rotate`.

    Args:
        x: `(batch, heads, seq, head_dim)`.
        cos: float32 `(batch or 1, 1, seq, head_dim)`, the same in both halves of the features.
        sin: as cos.
        sign: 1.0, or -1.0 for the way back.

    Returns:
        As x, laid out as `(batch, seq, heads, head_dim)`.
    """
    batch, heads, seq, dim = x.shape
    tokens = rows_of_heads(x)
    y = torch.empty(batch, seq, heads, dim, dtype=x.dtype, device=x.device)
    counts = (tokens.stride(1), heads, dim // 2, len(cos) * seq)
    blocks = (_power_of_two(heads), _power_of_two(dim // 2))
    launch("rotate", (batch * seq,), tokens, cos.contiguous(), sin.contiguous(), y, *counts, sign, *blocks)
    return y.transpose(1, 2)
