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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


def absmean(weight: Tensor) -> Tensor:
    """g = max(mean |W|, 1e-5), float32, shape ().

    The sum runs in float64: float32 sums depend on the device and on the number of threads, and one unit in the last
    place of g moves the threshold of every code. NaN and inf go through.
    """
    flat = weight.detach().reshape(-1)
    blocks = flat.split(_CPU_BLOCK) if flat.device.type == "cpu" else (flat,)
    total = torch.stack([block.double().abs_().sum() for block in blocks]).sum()
    return (total / flat.numel()).float().clamp(min=WEIGHT_EPS)


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """clamp(round_half_even(W / g), -1, 1) as int8, for W of any shape and g float32, shape ().

    Written as a comparison with g / 2, which is the same for every float32 W: g / 2 is exact, and |W| > g / 2 means
    that |W / g| lies more than half a unit in the last place above 0.5, so that it rounds to a number above 0.5.
    """
    half, weight = scale / 2, weight.detach().float()
    return torch.gt(weight, half).view(torch.int8) - torch.lt(weight, -half).view(torch.int8)


def quantize_weight(weight: Tensor) -> TernaryWeight:
    """Ternary codes and scale of a master weight of any shape and floating dtype; the arithmetic is float32."""
    scale = absmean(weight)
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
    y = integer_matmul(rows, weight.codes)
    y *= weight.scale / x.scale.reshape(-1, 1)
    if bias is not None:
        y += bias
    return y.to(dtype).view(*x.codes.shape[:-1], weight.codes.shape[0])


class _BitLinears(Function):
    """Several BitLinear maps of one input, which is quantised once: `(..., in)` to a tuple of `(..., out_i)`.

    Saved for the backward pass: the int8 codes of the input (a quarter of float32) and of the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        quantized = quantize_activation(x)
        ternary = [quantize_weight(weight) for weight in weights if weight is not None]
        ctx.save_for_backward(*quantized, *(tensor for pair in ternary for tensor in pair))
        ctx.x_dtype, ctx.bias_dtypes = x.dtype, [None if bias is None else bias.dtype for bias in biases]
        ctx.weight_dtypes = [weight.dtype for weight in weights if weight is not None]
        return tuple(ternary_linear(quantized, w, bias, dtype) for w, bias in zip(ternary, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, *flat = ctx.saved_tensors
        ternary = [TernaryWeight(*flat[i : i + 2]) for i in range(0, len(flat), 2)]
        rows, scale = codes.reshape(-1, codes.shape[-1]), scale.reshape(-1, 1)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_x = _grad_input(grads, ternary).to(ctx.x_dtype).view(codes.shape) if ctx.needs_input_grad[0] else None
        needs = ctx.needs_input_grad[3:]
        grad_weights = [
            _grad_weight(grad, rows, scale).to(dtype) if need else None
            for grad, dtype, need in zip(grads, ctx.weight_dtypes, needs, strict=False)
        ]
        grad_biases = [
            grad.sum(dim=0, dtype=torch.float32).to(dtype) if dtype and need else None
            for grad, dtype, need in zip(grads, ctx.bias_dtypes, needs[len(grads) :], strict=True)
        ]
        return grad_x, None, None, *grad_weights, *grad_biases


def _grad_input(grads: Sequence[Tensor], weights: Sequence[TernaryWeight]) -> Tensor:
    """sum_i (dL/dy_i . q_i) g_i in float32, `(tokens, in)`; the products run in the dtype of dL/dy."""
    first, *others = [(g @ w.codes.to(g.dtype)).float().mul_(w.scale) for g, w in zip(grads, weights, strict=True)]
    for term in others:
        first += term
    return first


def _grad_weight(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(dL/dy / s)^T . xq, `(out, in)`, in the dtype of dL/dy: int8 codes are exact in bfloat16."""
    return (grad / scale).to(grad.dtype).t() @ codes.to(grad.dtype)


def bit_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """BitLinear maps of one input with straight-through gradients: y_i = (xq . q_i) g_i / s + b_i.

    Args:
        x: `(..., in)`, any floating dtype; quantised once for all maps.
        weights: master weights `(out_i, in)`.
        biases: `(out_i,)` or None, one per weight.

    Returns:
        `(..., out_i)` for each weight, in the dtype of x, or of autocast where that is on. The backward products run in
        the same dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        outputs: tuple[Tensor, ...] = _BitLinears.apply(x, dtype, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
    return outputs
