"""All rounding of this project: ternary weights, int8 activations, and the linear map between them (W1.58A8).

    weights      g = max(mean |W|, 1e-5)          q  = clamp(round_half_even(W / g), -1, 1)        W ~ q g
    activations  s = 127 / max(max |x|, 1e-5)     xq = clamp(round_half_even(x s), -128, 127)      x ~ xq / s
    output       y = (xq . q) g / s + b

g is one number per weight matrix, s one number per token. The forward pass, the exporter and the verifier all call the
functions below, so that an exported code is the trained one. Rounding has gradient one (straight-through estimator):

    dL/dx = (dL/dy . q) g          dL/dW = (dL/dy / s)^T . xq          latent weights are never clipped

Source: "The Era of 1-bit LLMs" (arXiv 2402.17764, section 2), BitNet b1.58 2B4T report (arXiv 2504.12285, section 2),
and Microsoft's "Training Tips, Code and FAQ" (unilm/bitnet).
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from bitnet_train.kernels import gpu, native
from bitnet_train.kernels.integer_matmul import integer_matmul

WEIGHT_EPS = 1e-5  # floor of the mean |W|
ACTIVATION_EPS = 1e-5  # floor of the absmax of a token
INT8_MAX = 127

_CPU_BLOCK = 1 << 17  # weights per block of the absmean on CPU: a float64 copy of 1 MB stays in the cache


class TernaryWeight(NamedTuple):
    """`codes` int8 in {-1, 0, 1} with the shape of the weight; `scale` float32, shape (); codes * scale ~ weight."""

    codes: Tensor
    scale: Tensor


class Int8Activation(NamedTuple):
    """`codes` int8 `(..., features)`; `scale` float32 `(..., 1)`, one per token; codes / scale ~ x."""

    codes: Tensor
    scale: Tensor


def row_sums(weight: Tensor) -> Tensor:
    """sum |w| of every row, float64 `(rows,)`, of a weight `(rows, ...)`; one of fewer dimensions is a single row.

    No row's sum depends on the others: where rows lie on several processes, their sums are those of the whole matrix.
    """
    rows = weight.detach()
    rows = rows.reshape(len(rows), prod(rows.shape[1:])) if rows.ndim > 1 else rows.reshape(1, -1)
    if native.available(rows) and rows.is_contiguous() and rows.numel():
        return native.absolute_sums(rows, rows.shape[1])
    if gpu.available(rows, size=rows.shape[1]) and gpu.folds(rows.shape[1]):
        return gpu.absolute_sums(rows)
    in_blocks = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    step = max(1, _CPU_BLOCK // max(1, rows.shape[1]) if in_blocks else len(rows))
    return torch.cat([_folded(block.double().abs()) for block in rows.split(step)])


def _folded(rows: Tensor) -> Tensor:
    """Adds the right half of every row to its left half until one is left: one order on every device.

    Not in place: torch.compile takes minutes over slices that are written into slices.
    """
    while (columns := rows.shape[1]) > 1:
        half = (columns + 1) // 2
        rows = rows[:, :half] + F.pad(rows[:, half:], (0, 2 * half - columns))
    return rows[:, 0]


def absmean_of(row_sums: Tensor, count: int) -> Tensor:
    """g of a matrix of `count` weights with these sums of rows, float32, shape ()."""
    return (row_sums.sum() / count).float().clamp(min=WEIGHT_EPS)


def absmean(weight: Tensor) -> Tensor:
    """g = max(mean |W|, 1e-5), float32, shape ().

    The sum runs in float64, row by row: float32 sums depend on the device and on the number of threads, and one unit in
    the last place of g moves the threshold of every code. NaN and inf go through.
    """
    if gpu.stacks([weight]):  # the sum over rows that `fused.stack` has there, in its order
        return gpu.absmeans([weight.detach().contiguous()])[0]
    return absmean_of(row_sums(weight), weight.numel())


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """clamp(round_half_even(W / g), -1, 1) as int8, for W of any shape and g float32, shape ().

    Written as a comparison with g / 2, which is the same for every float32 W: g / 2 is exact, and |W| > g / 2 means
    that |W / g| lies more than half a unit in the last place above 0.5, so that it rounds to a number above 0.5.
    """
    half, weight = scale / 2, weight.detach()
    if weight.is_contiguous() and native.available(weight):
        return native.ternary_codes(weight, float(half))
    if gpu.available(weight, half):
        return gpu.ternary_codes(weight, half)
    weight = weight.float()
    return torch.gt(weight, half).to(torch.int8) - torch.lt(weight, -half).to(torch.int8)


def quantize_weight(weight: Tensor, scale: Tensor | None = None) -> TernaryWeight:
    """Ternary codes and scale of a master weight of any shape and floating dtype; the arithmetic is float32.

    The scale is the `absmean`, unless it is known.
    """
    scale = absmean(weight) if scale is None else scale
    return TernaryWeight(ternary_codes(weight, scale), scale)


def quantize_activation(x: Tensor) -> Int8Activation:
    """Int8 codes `(..., features)` and scale float32 `(..., 1)` of activations of any floating dtype.

    A token with a NaN has scale NaN and one with an inf has scale 0: what is computed from either is not finite again.
    """
    x = x.detach().float()
    scale = INT8_MAX / x.abs().amax(dim=-1, keepdim=True).clamp(min=ACTIVATION_EPS)
    # The clamp of the formula never acts: |x s| <= 127 (1 + 2^-23), which rounds to 127.
    return Int8Activation((x * scale).round_().to(torch.int8), scale)


def ternary_linear(x: Int8Activation, weight: TernaryWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = (xq . q) g / s + b in `dtype`: `(..., in)` and `(out, in)` to `(..., out)`. The sum of integers is exact."""
    rows = x.codes.reshape(-1, x.codes.shape[-1])
    y = integer_matmul(rows, weight.codes) * (weight.scale * x.scale.reshape(-1, 1).reciprocal())
    if bias is not None:
        y += bias
    return y.to(dtype).view(*x.codes.shape[:-1], weight.codes.shape[0])


class _Lerp(Function):
    """x + strength (q(x) - x) with the gradient of x: rounding is invisible to it (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, strength: float) -> Tensor:
        return torch.lerp(x, quantized.to(x.dtype), strength)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


def fake_quantize_weight(weight: Tensor, strength: float = 1.0) -> Tensor:
    """W + strength (q g - W) in the shape and dtype of W, with the gradient of W."""
    codes, scale = quantize_weight(weight)
    lerped: Tensor = _Lerp.apply(weight, codes * scale, strength)  # type: ignore[no-untyped-call]
    return lerped


def fake_quantize_activation(x: Tensor, strength: float = 1.0) -> Tensor:
    """x + strength (xq / s - x) in the shape and dtype of x, with the gradient of x."""
    codes, scale = quantize_activation(x)
    lerped: Tensor = _Lerp.apply(x, codes / scale, strength)  # type: ignore[no-untyped-call]
    return lerped


def bit_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], strength: float = 1.0
) -> tuple[Tensor, ...]:
    """BitLinear maps of one input by fake quantisation: the reference of `fused`, and the warm-up from a dense model.

    Args:
        x: `(..., in)`, any floating dtype; quantised once for all maps.
        weights: master weights `(out_i, in)`.
        biases: `(out_i,)` or None, one per weight.
        strength: lambda in v + lambda (q(v) - v) for activations and weights: 0 is a dense layer, 1 is BitLinear.

    Returns:
        `(..., out_i)` for each weight; the products run in the dtype of x, or of autocast where that is on.
    """
    x = fake_quantize_activation(x, strength)
    return tuple(F.linear(x, fake_quantize_weight(w, strength), b) for w, b in zip(weights, biases, strict=True))
