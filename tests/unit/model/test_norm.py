"""RMSNorm against its formula under plain autograd."""

import pytest
import torch
from torch import Tensor

from bitnet_train.model.norm import RMSNorm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 16), (2, 3, 7)])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y, expected = norm(x), formula(x, norm.weight, 1e-5)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected.float())
    grad = torch.randn_like(y)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    for got, want in zip(
        torch.autograd.grad(y, (x, norm.weight), grad),
        torch.autograd.grad(expected, (x, norm.weight), grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def test_zeros_and_nan() -> None:
    norm = RMSNorm(4, 1e-5)
    assert norm(torch.zeros(2, 4)).eq(0).all()
    assert norm(torch.full((1, 4), torch.nan)).isnan().all()
