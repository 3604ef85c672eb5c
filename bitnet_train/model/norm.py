"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalises the last dimension in float32: `(..., size)` of any floating dtype to float32 `(..., size)`.

    The result stays float32 even for bfloat16 input: where a BitLinear follows it is rounded once, to int8.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight
