"""The fused BitLinear against the float path of quant.py with norm, activation and residual written out."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bitnet_train.fused import Norm, normed_bit_linear, stack
from bitnet_train.kernels import native
from bitnet_train.quant import bit_linear

SIZES = st.tuples(st.integers(1, 70), st.sampled_from([5, 64, 123]), st.sampled_from([1, 7, 61, 128]))


@pytest.fixture(params=["native", "torch"], autouse=True)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the passes in C++ and in torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda *tensors, **options: False)
    elif native.library() is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


def reference(
    x: Tensor, weights: Sequence[Tensor], norm: Norm | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """The same by autograd over plain operations and fake quantisation."""
    if activation is not None:
        gate, up = x.chunk(2, dim=-1)
        x = (F.relu(gate).square() if activation == "relu2" else F.silu(gate)) * up
    if norm is not None:
        x = x * (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    y = torch.cat(bit_linear(x, weights, [None] * len(weights)), dim=-1)
    return y if residual is None else y + residual


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("activation", [None, "relu2", "silu"])
@given(sizes=SIZES, magnitude=st.sampled_from([1e-4, 1.0, 1e4]), with_residual=st.booleans())
def test_output_and_gradients(
    activation: str | None, sizes: tuple[int, int, int], magnitude: float, with_residual: bool
) -> None:
    tokens, size, out = sizes
    if activation is not None:
        magnitude = min(magnitude, 1.0)
    x = (torch.randn(tokens, size if activation is None else 2 * size) * magnitude).requires_grad_()
    weights = [torch.randn(n, size, requires_grad=True) for n in (out, 3)]
    norm = Norm((torch.rand(size) + 0.5).requires_grad_(), 1e-6)
    residual = torch.randn(tokens, out + 3, requires_grad=True) if with_residual else None
    inputs = [x, *weights, norm.weight, *([] if residual is None else [residual])]
    y = normed_bit_linear(x, weights, norm=norm, activation=activation, residual=residual)
    expected = reference(x, weights, norm, activation, residual)
    grad = torch.randn_like(y)
    got, want = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    codes_differ = (y - expected).abs().max() > 1e-4 * expected.abs().max()
    if not codes_differ:  # a tie that an ulp of the norm decides moves one code: rare, see below
        assert_same([y], [expected], 1e-5)
        assert_same(got, want, 2e-5)
    assert_same([y], [expected], 0.05)


def test_ties_are_rare() -> None:
    x, weight = torch.randn(2000, 64), torch.randn(16, 64)
    norm = Norm(torch.rand(64) + 0.5, 1e-6)
    y = normed_bit_linear(x, [weight], norm=norm)
    off = ((y - reference(x, [weight], norm, None, None)).abs() > 1e-4).any(dim=-1)
    assert off.float().mean() < 0.01


@given(sizes=st.tuples(st.integers(1, 70), st.sampled_from([1, 5, 64, 123]), st.sampled_from([1, 7, 61])))
def test_without_norm_the_codes_are_those_of_quant(sizes: tuple[int, int, int]) -> None:
    tokens, size, out = sizes
    shapes = ((tokens, size), (out, size), (out,))
    x, weight, bias = inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y, (expected,) = normed_bit_linear(x, [weight], bias=bias), bit_linear(x, [weight], [bias])
    assert_same([y], [expected], 1e-5)
    grad = torch.randn_like(y)
    assert_same(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), 2e-5)


def test_autocast_decides_the_dtype_and_masters_get_float32_gradients() -> None:
    x, weight = torch.randn(40, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    norm = Norm(torch.ones(64, requires_grad=True), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = normed_bit_linear(x, [weight], norm=norm)
        stream = normed_bit_linear(x, [weight], norm=norm, residual=torch.zeros(40, 32))
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, stream.bfloat16())  # the residual adds in float32, and rounds once
    grad = torch.randn(40, 32)
    got = torch.autograd.grad(stream, [x, weight, norm.weight], grad)
    want = torch.autograd.grad(reference(x, [weight], norm, None, None), [x, weight, norm.weight], grad)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 2**-7 * b.norm()


def test_autocast_in_the_backward_pass_changes_nothing() -> None:
    x, weight, gain = inputs = [torch.randn(shape, requires_grad=True) for shape in ((40, 64), (32, 64), (64,))]
    y, grad = normed_bit_linear(x, [weight], norm=Norm(gain, 1e-6)), torch.randn(40, 32)
    expected = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
            assert torch.equal(got, want)


def test_tensors_without_memory_pass_under_autocast() -> None:
    x, weight = torch.empty(2, 3, 16, device="meta"), torch.empty(8, 16, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normed_bit_linear(x, [weight]).shape == (2, 3, 8)


def test_an_activation_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be None where norm is None, got 'silu'"):
        normed_bit_linear(torch.randn(2, 16), [torch.randn(4, 8)], activation="silu")


def test_leading_dimensions_and_codes_at_hand() -> None:
    x, weights = torch.randn(2, 3, 16), [torch.randn(n, 16) for n in (8, 4)]
    together = normed_bit_linear(x, weights, stacked=stack(weights))
    assert together.shape == (2, 3, 12)
    assert torch.equal(together[..., 8:], normed_bit_linear(x, weights[1:]))


def test_a_frozen_weight_costs_no_product() -> None:
    weight, x = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    for trained, products in ((weight, 2), (weight.detach(), 1)):
        y = normed_bit_linear(x, [trained])
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == products * 2 * 4 * 8 * 16


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight, norm = torch.randn(3, 8), torch.randn(5, 8), Norm(torch.ones(8), 1e-6)
    x[1, 2] = bad
    for kind in (None, norm):
        y = normed_bit_linear(x, [weight], norm=kind)
        assert y[[0, 2]].isfinite().all()
        assert not y[1].isfinite().any()
    weight[0, 0] = bad
    assert not normed_bit_linear(torch.randn(3, 8), [weight]).isfinite().any()


def test_zeros_and_constants() -> None:
    assert normed_bit_linear(torch.zeros(2, 8), [torch.randn(4, 8)]).eq(0).all()
    assert normed_bit_linear(torch.randn(2, 8), [torch.zeros(4, 8)]).eq(0).all()
    y = normed_bit_linear(torch.full((2, 8), 3.0), [torch.full((4, 8), -0.25)])
    torch.testing.assert_close(y, torch.full((2, 4), -6.0))
