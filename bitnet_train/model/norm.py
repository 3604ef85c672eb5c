"""RMSNorm: y = x r w with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467).

    dL/dw = sum over tokens of g x r
    dL/dx = r (g w - x r mean(g w x r))        g = dL/dy

Autograd would keep every intermediate product and walk over each of them again; this keeps x and one r per token, as
torch's own function does on CUDA.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bitnet_train.autocast import no_autocast
from bitnet_train.fused import Norm


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (x32 * r).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        with no_autocast(x):
            normal = (x * r).reshape(-1, x.shape[-1])  # x r, float32 `(tokens, size)`
            rows = grad.reshape(normal.shape)
            product = rows * normal
            grad_weight = torch.ones(1, len(rows), device=x.device) @ product  # sums columns faster than sum does
            mean = (product @ weight.float()).div_(x.shape[-1])[:, None]
            grad_x = torch.mul(rows, weight, out=product).addcmul_(normal, mean, value=-1)
        return grad_x.view(x.shape).mul_(r).to(x.dtype), grad_weight[0].to(weight.dtype), None


class RMSNorm(nn.Module):
    """Normalises the last dimension in float32: `(..., size)` of any floating dtype to float32 `(..., size)`.

    The result stays float32 even for bfloat16 input: where a BitLinear follows it is rounded once, to int8.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def norm(self) -> Norm:
        """Gain and epsilon, for where a BitLinear takes the norm into itself."""
        return Norm(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., size)` of any floating dtype to float32 of the same shape."""
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y
