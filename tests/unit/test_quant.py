"""quant.py: the reference formulas, their gradients, and what happens at the edges of floating point."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.kernels.integer_matmul import integer_matmul
from bitnet_train.quant import (
    WEIGHT_EPS,
    absmean,
    bit_linear,
    quantize_activation,
    quantize_weight,
    ternary_codes,
)

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 123), st.integers(1, 31))


def fake_quantized(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: rounded values as floats, on which plain autograd gives the straight-through gradients."""
    g = weight.double().abs().mean().float().clamp(min=1e-5)
    w = (weight / g).round().clamp(-1, 1) * g
    s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * s).round().clamp(-128, 127) / s, w


@given(
    st.lists(st.floats(-3, 3, width=32, allow_subnormal=False), min_size=1, max_size=64),
    st.floats(2**-16, 10, width=32, allow_subnormal=False),
)
def test_codes_are_the_rounded_quotients(values: list[float], scale: float) -> None:
    weight, g = torch.tensor(values), torch.tensor(scale)
    assert torch.equal(ternary_codes(weight, g), (weight / g).round().clamp(-1, 1).to(torch.int8))


def test_codes_at_the_threshold_round_half_to_even() -> None:
    g = torch.tensor(0.7)
    half = g / 2
    around = torch.stack([half, -half, half.nextafter(g), -half.nextafter(g)])
    assert ternary_codes(around, g).tolist() == [0, 0, 1, -1]


def test_a_weight_by_hand() -> None:
    codes, scale = quantize_weight(torch.tensor([[2.0, -0.1], [0.9, -1.0]]))
    assert scale == 1.0
    assert codes.tolist() == [[1, 0], [1, -1]]
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == ()


def test_an_activation_by_hand() -> None:
    codes, scale = quantize_activation(torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]]  # -63.5 rounds to the even -64
    assert scale.flatten().tolist() == pytest.approx([127.0, 127 / 1e-5])


@pytest.mark.parametrize("threads", [1, 2])
def test_absmean_does_not_depend_on_the_threads(threads: int) -> None:
    weight = torch.randn(700, 1001)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert absmean(weight) == weight.double().abs().mean().float()
    finally:
        torch.set_num_threads(before)


def test_absmean_has_a_floor() -> None:
    assert absmean(torch.zeros(3, 5)) == pytest.approx(WEIGHT_EPS)
    assert quantize_weight(torch.zeros(3, 5)).codes.count_nonzero() == 0


@given(SHAPES)
def test_integer_matmul_is_exact(shape: tuple[int, int, int]) -> None:
    tokens, inner, out = shape
    a = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8)
    b = torch.randint(-1, 2, (out, inner), dtype=torch.int8)
    assert torch.equal(integer_matmul(a, b).long(), a.long() @ b.long().t())


def test_integer_matmul_in_floats_is_exact_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.full((2, 301), 127, dtype=torch.int8), torch.ones(3, 301, dtype=torch.int8)
    monkeypatch.setattr("bitnet_train.kernels.integer_matmul._has_int8_matmul", lambda a, b: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert integer_matmul(a, b).eq(127 * 301).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("width", [24, 40])
def test_matrices_of_other_widths_have_no_product(rows: int, width: int) -> None:
    with pytest.raises(RuntimeError):
        integer_matmul(torch.ones(rows, width, dtype=torch.int8), torch.ones(3, 32, dtype=torch.int8))


def test_integer_matmul_of_nothing() -> None:
    assert integer_matmul(torch.empty(0, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)).shape == (0, 3)


@given(SHAPES, st.sampled_from([1e-20, 1e-3, 1.0, 1e15]))
def test_forward_and_gradients_are_those_of_the_reference(shape: tuple[int, int, int], magnitude: float) -> None:
    tokens, inner, out = shape
    x = (torch.randn(tokens, inner) * magnitude).requires_grad_()
    weight, bias = torch.randn(out, inner, requires_grad=True), torch.randn(out, requires_grad=True)
    (y,) = bit_linear(x, [weight], [bias])
    xq, wq = (tensor.detach().requires_grad_() for tensor in fake_quantized(x, weight))
    grad = torch.randn_like(y)
    expected = xq @ wq.t() + bias.detach()
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.detach().abs().max().item())
    for got, want in ((x.grad, xq.grad), (weight.grad, wq.grad), (bias.grad, grad.sum(dim=0))):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_several_layers_at_once_are_each_layer_alone() -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    weights = [torch.randn(n, 16, requires_grad=True) for n in (8, 4, 4)]
    together = bit_linear(x, weights, [None] * 3)
    alone = [bit_linear(x, [weight], [None])[0] for weight in weights]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    losses = [torch.stack([y.square().sum() for y in outputs]).sum() for outputs in (together, alone)]
    grads, wanted = (torch.autograd.grad(loss, [x, *weights]) for loss in losses)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_decides_the_dtype_of_the_output_and_masters_get_float32_gradients() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = bit_linear(x, [weight], [None])
    assert y.dtype == torch.bfloat16
    xq, wq = fake_quantized(x, weight)
    # The reference rounds both factors to bfloat16; `fused` multiplies integers, see test_fused.py.
    assert ((y - xq @ wq.t()).abs() <= 2.0**-7 * (xq.abs() @ wq.abs().t())).all()
    grad = torch.randn_like(y)
    y.backward(grad)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, grad.float().t() @ xq, rtol=2e-2, atol=2e-2)


def test_gradients_that_nobody_needs_are_not_made() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    (y,) = bit_linear(torch.randn(4, 16), [weight], [None])
    y.sum().backward()
    assert weight.grad is not None
    (y,) = bit_linear(torch.randn(4, 16, requires_grad=True), [weight.detach()], [None])
    y.sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    x[1, 2] = bad
    (y,) = bit_linear(x, [weight], [None])
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()
    weight[0, 0] = bad
    (y,) = bit_linear(torch.randn(3, 8), [weight], [None])
    assert not y.isfinite().any()
