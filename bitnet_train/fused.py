"""A BitLinear with all that surrounds it in the decoder, as one differentiable function.

    v = RMSNorm(source(x))          source: x itself, or act(gate) * up for x = [gate, up]
    y = BitLinear(v) + residual     several maps of one v stand beside each other in y

Between the two matrix products of a decoder lies one pass over the tokens instead of a dozen: norm, absmax, rounding in
one, the scales, the residual and the change of dtype in another. What is kept for the backward pass is x, the int8
codes of v and the ternary codes, all of which exist anyway, and two numbers per token.

    dL/dv = (dL/dy g) . q       dL/dW = (dL/dy / s)^T . vq       dL/dresidual = dL/dy

The products run in the compute dtype (autocast's, else that of x). The passes are in C++ on CPU (kernels/native), in
Triton on CUDA (kernels/gpu) and in torch elsewhere; all follow the formulas of quant.py and give the same codes. On
CUDA the int8 product and the pass behind it are one, and g and 1 / s go with the codes, which are converted anyway:
dL/dy . (q g) and dL/dy^T . (vq / s), the rounding of fake quantisation under autocast.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bitnet_train.autocast import compute_dtype, no_autocast
from bitnet_train.kernels import gpu, gpu_product, native
from bitnet_train.kernels.integer_matmul import integer_matmul
from bitnet_train.quant import quantize_activation, quantize_weight


class Stacked(NamedTuple):
    """Ternary matrices of one input, one below the other: int8 `codes` (out, in) and the scale g of each row (out,)."""

    codes: Tensor
    column: Tensor


class Norm(NamedTuple):
    """An RMSNorm: its gain `(size,)` and epsilon."""

    weight: Tensor
    eps: float


def stack(weights: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None) -> Stacked:
    """Quantises master weights `(out_i, in)`, each with its own scale, which may be known, and stacks them."""
    if not any(scale is not None for scale in scales or ()) and gpu.stacks(weights):
        return Stacked(*gpu.stack(weights))
    ternary = [quantize_weight(w, g) for w, g in zip(weights, scales or [None] * len(weights), strict=True)]
    codes = ternary[0].codes if len(ternary) == 1 else torch.cat([weight.codes for weight in ternary])
    return Stacked(codes, torch.cat([weight.scale.expand(len(weight.codes)) for weight in ternary]))


def source(x: Tensor, activation: str | None) -> Tensor:
    """float32 x, or act(gate) * up of a row `(..., 2 size)` that holds gate, then up."""
    if activation is None:
        return x.float()
    gate, up = x.float().chunk(2, dim=-1)
    return (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up


def quantize(x: Tensor, norm: Norm | None, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 codes of RMSNorm(source(x)).

    Args:
        x: `(tokens, size)`, or `(tokens, 2 size)` with an activation.
        norm: None leaves out the norm.
        activation: None, "relu2" or "silu".

    Returns:
        codes int8 `(tokens, size)`; scale s = 127 / max |v| and rms 1 / sqrt(mean(source^2) + eps), float32
        `(tokens, 1)`.
    """
    weight, eps = norm or (None, 0.0)
    if native.available(x, weight):
        return native.quantize(x, weight, eps, activation)
    if gpu.available(x, weight, size=x.shape[1] // (1 if activation is None else 2)):
        return gpu.quantize(x, weight, eps, activation)
    v = source(x, activation)
    rms = v.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    codes, scale = quantize_activation(v if weight is None else v * rms * weight)
    return codes, scale, rms


def linear(
    codes: Tensor, scale: Tensor, stacked: Stacked, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (codes . stacked.codes^T) column / scale + bias + residual in `dtype`: `(tokens, size)` to `(tokens, out)`.

    The sum of integers is exact; what follows is float32, rounded once.
    """
    if gpu.available(scale, bias, residual, scale.new_empty(0, dtype=dtype)):
        return gpu_product.linear(codes, stacked.codes, stacked.column, scale, bias, residual, dtype)
    products = integer_matmul(codes, stacked.codes)
    return dequantize(products, stacked.column, scale, bias, residual, dtype)


def dequantize(
    products: Tensor, column: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = products * column / scale + bias + residual: int32 `(tokens, out)`, `(out,)`, `(tokens, 1)` to `dtype`."""
    if native.available(scale, bias, residual, products.new_empty(0, dtype=dtype)):
        return native.dequantize(products, column, scale, bias, residual, dtype)
    y = products * (column * scale.reciprocal())
    for term in (bias, residual):
        y = y if term is None else y.add_(term)
    return y.to(dtype)


def linear_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, stacked: Stacked, dtype: torch.dtype, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dL/dv `(tokens, size)` and dL/dW `(out, size)`, if it is needed, of `linear`; products and results in `dtype`."""
    if gpu.available(grad, grad.new_empty(0, dtype=dtype)):
        grad = grad.to(dtype)
        grad_v = grad @ gpu.expand(stacked.codes, stacked.column, dtype)
        return grad_v, grad.t() @ gpu.expand(codes, scale.reciprocal(), dtype) if needs_weight else None
    by_column, by_scale = scale_gradient(grad, stacked.column, scale, dtype)
    grad_v = by_column @ stacked.codes.to(dtype)
    return grad_v, by_scale @ codes.to(dtype) if needs_weight else None  # int8 codes are exact in bfloat16


def scale_gradient(grad: Tensor, column: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The left factors of both backward products, in `dtype`: grad * column `(tokens, out)`, (grad / scale)^T."""
    if native.available(grad, grad.new_empty(0, dtype=dtype)):
        return native.scale_gradient(grad, column, scale, dtype)
    return (grad * column).to(dtype), (grad * scale.reciprocal()).to(dtype).t()


def norm_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, rms: Tensor, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of v = RMSNorm(source(x)) for x, in its dtype, and for the gain; n = source(x) rms:

    dL/dgain = sum over tokens of dL/dv n          dL/dsource = rms (dL/dv gain - n mean(dL/dv gain n))
    """
    if norm is None:
        return grad.to(x.dtype), None
    if native.available(grad, x, norm.weight):
        return native.norm_backward(grad, x, norm.weight, rms, activation)
    if gpu.available(grad, x, norm.weight, size=grad.shape[1]):
        return gpu.norm_backward(grad, x, norm.weight, rms, activation)
    normal, grad = source(x, activation) * rms, grad.float()
    product = grad * normal
    grad_weight = product.sum(dim=0)
    mean = product.mul_(norm.weight).mean(dim=-1, keepdim=True)
    grad_source = (grad * norm.weight).sub_(normal.mul_(mean)).mul_(rms)
    return _source_backward(grad_source, x, activation).to(x.dtype), grad_weight


def _source_backward(grad: Tensor, x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return grad
    gate, up = x.float().chunk(2, dim=-1)
    if activation == "relu2":
        positive = F.relu(gate)
        return torch.cat((grad * up * (2 * positive), grad * positive.square()), dim=-1)
    sigmoid = gate.sigmoid()
    return torch.cat((grad * up * (sigmoid * (1 + gate * (1 - sigmoid))), grad * (gate * sigmoid)), dim=-1)


class _NormedBitLinears(Function):
    """`x` to y, over rows; the arguments are those of `normed_bit_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str | None,
        stacked: Stacked,
        dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        norm = None if gain is None else Norm(gain, eps)
        codes, scale, rms = quantize(x, norm, activation)
        ctx.save_for_backward(x if gain is not None else None, gain, codes, scale, rms, *stacked)
        ctx.eps, ctx.activation, ctx.dtype, ctx.x_dtype = eps, activation, dtype, x.dtype
        ctx.residual_dtype, ctx.bias_dtype = (None if t is None else t.dtype for t in (residual, bias))
        ctx.weights = [(len(weight), weight.dtype) for weight in weights]
        return linear(codes, scale, stacked, bias, residual, dtype if residual is None else residual.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, codes, scale, rms, ternary, column = ctx.saved_tensors
        with no_autocast(grad):
            needed = ctx.needs_input_grad[8:]
            grad_v, product = linear_backward(grad, codes, scale, Stacked(ternary, column), ctx.dtype, any(needed))
            grad_weights = _split(product, ctx.weights, needed)
            norm = None if gain is None else Norm(gain, ctx.eps)
            x = grad_v.to(ctx.x_dtype) if x is None else x
            grad_x, grad_gain = norm_backward(grad_v, x, norm, rms, ctx.activation)
        grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        grad_bias = None if ctx.bias_dtype is None else grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_residual, grad_gain, grad_bias, None, None, None, None, *grad_weights


def _split(
    product: Tensor | None, weights: Sequence[tuple[int, torch.dtype]], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of stacked weights, given as rows and dtype, to each of them; none where nobody needs it."""
    if product is None:
        return [None] * len(weights)
    parts = product.split([rows for rows, _ in weights])
    return [part.to(dtype) if need else None for part, (_, dtype), need in zip(parts, weights, needed, strict=True)]


def normed_bit_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    stacked: Stacked | None = None,
) -> Tensor:
    """y = BitLinear(RMSNorm(source(x))) + residual, with straight-through gradients.

    Args:
        x: `(..., size)` of any floating dtype; `(..., 2 size)`, gate then up, with an activation.
        weights: master weights `(out_i, size)`.
        norm: gain `(size,)` and epsilon; None where x is normalised already (without activation).
        activation: None, "relu2" or "silu".
        residual: `(..., sum out_i)`, added before the one rounding to its dtype.
        bias: `(sum out_i,)`.
        stacked: the weights' codes and scales where the caller has them; made here otherwise.

    Returns:
        `(..., sum out_i)` in the dtype of the residual; without one in that of autocast, or of x.

    Raises:
        ValueError: an activation without a norm.
    """
    if norm is None and activation is not None:
        raise ValueError(f"activation must be None where norm is None, got {activation!r}")
    gain, eps = norm or (None, 0.0)
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1])
    dtype = compute_dtype(x)
    with no_autocast(x):
        stacked = stacked or stack(weights)
        y: Tensor = _NormedBitLinears.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), rows, gain, bias, eps, activation, stacked, dtype, *weights
        )
    return y.view(*x.shape[:-1], y.shape[-1])
