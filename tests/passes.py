"""What the C++ passes and the Triton programs are both asked."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_train import fused
from bitnet_train.model.rope import rotate, rotation
from bitnet_train.quant import quantize_activation


def assert_codes_are_those_of_quant(dtype: torch.dtype, count: int, size: int) -> None:
    """Without a norm, with a row of zeros and a tie or two."""
    x = torch.randn(count, size).to(dtype)
    x[0] = 0
    x[-1, 0] = 0.5
    codes, scale, _ = fused.quantize(x, None, None)
    expected = quantize_activation(x)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scale, expected.scale)


def rotations(dtype: torch.dtype, seq: int, batches: int, laid_out: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that turns heads, and its gradient.

    Heads in the middle of a projection's row, as they are met, or one after the other; a row of angles for each row of
    the batch, or for all.
    """
    projected = torch.randn(2, seq, 80).to(dtype).requires_grad_()
    by = rotation(torch.randint(50, (batches, seq)), head_dim=12, theta=1e4)
    grad = torch.randn(2, 3, seq, 12).to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        x = projected[..., 10:46].unflatten(-1, (3, 12)).transpose(1, 2)
        y = rotate(x if laid_out else x.contiguous(), by)
        return y, torch.autograd.grad(y, projected, grad)[0]

    return run
