"""quant.py against its formulas, written out here in float64 on codes of float32, for inputs that hypothesis makes.

Tokens and matrices of odd sizes, random, zero, constant or with an outlier, huge and tiny; in float32 and bfloat16.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.quant import absmean, bit_linear, quantize_activation, quantize_weight, ternary_codes, ternary_linear

SIZES = st.sampled_from([1, 2, 3, 5, 7, 16, 31, 64, 123, 127, 251])
MAGNITUDES = st.sampled_from([1e-30, 1e-12, 1e-6, 1e-5, 1e-3, 1.0, 300.0, 1e6, 1e15])
KINDS = st.sampled_from(["random", "zero", "constant", "outlier"])
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # of a sum of products, relative to the sum of their sizes
DTYPES = st.sampled_from(list(ROUNDING))


@st.composite
def matrices(draw: st.DrawFn, columns: int, own_magnitudes: bool) -> Tensor:
    """float32 `(rows, columns)`; with magnitudes of their own, every row is of another kind and size."""
    rows = draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, columns, generator=generator)
    parts = values.split(1) if own_magnitudes and rows < 8 else (values,)
    return torch.cat([_of_kind(part, draw(KINDS)) * draw(MAGNITUDES) for part in parts])


def _of_kind(values: Tensor, kind: str) -> Tensor:
    if kind == "outlier":
        return torch.cat((values[:, :1] * 1e4, values[:, 1:]), dim=1)
    return {"random": values, "zero": torch.zeros_like(values), "constant": torch.full_like(values, -0.7)}[kind]


class Case(NamedTuple):
    """Tokens `(rows, in)`, a master `(out, in)` and a bias `(out,)`."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = draw(SIZES)
    weight = draw(matrices(columns, own_magnitudes=False))
    return Case(draw(matrices(columns, own_magnitudes=True)), weight, torch.randn(len(weight)))


class Codes(NamedTuple):
    """The formulas: activation codes and s, weight codes and g, as float64."""

    xq: Tensor
    s: Tensor
    q: Tensor
    g: Tensor


def formula(x: Tensor, weight: Tensor) -> Codes:
    x, weight = x.float(), weight.float()
    g = weight.double().abs().mean().float().clamp(min=1e-5)
    s = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    xq, q = (x * s).round().clamp(-128, 127), (weight / g).round().clamp(-1, 1)
    return Codes(xq.double(), s.double(), q.double(), g.double())


def assert_within(got: Tensor | None, want: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of `dtype` of a sum whose terms have these sizes in all."""
    assert got is not None
    assert got.dtype == dtype
    error = (got.double() - want).abs()
    assert (error <= ROUNDING[dtype] * terms + 1e-37).all(), f"{(error / terms.clamp(min=1e-37)).max()} of the terms"


@given(cases())
def test_codes_and_scales_are_those_of_the_formulas(case: Case) -> None:
    want = formula(case.x, case.weight)
    activation, weight = quantize_activation(case.x), quantize_weight(case.weight)
    assert torch.equal(activation.codes.double(), want.xq)
    assert torch.equal(activation.scale.double(), want.s)
    assert torch.equal(weight.codes.double(), want.q)
    assert torch.equal(weight.scale.double(), want.g)
    assert weight.scale == absmean(case.weight)
    assert torch.equal(weight.codes, ternary_codes(case.weight, weight.scale))


@given(cases(), st.booleans(), DTYPES)
def test_outputs_are_those_of_the_formula(case: Case, with_bias: bool, dtype: torch.dtype) -> None:
    x = case.x.to(dtype)
    bias = case.bias if with_bias else torch.zeros_like(case.bias)
    xq, s, q, g = formula(x, case.weight)
    product = xq @ q.t() * (g / s)
    (y,) = bit_linear(x, [case.weight], [bias if with_bias else None])
    assert_within(y, product + bias, product.abs() + bias.abs(), dtype)
    exported = ternary_linear(quantize_activation(x), quantize_weight(case.weight), bias, dtype)
    assert_within(exported, product + bias, product.abs() + bias.abs(), dtype)


@given(cases(), DTYPES)
def test_gradients_are_those_of_the_formula(case: Case, dtype: torch.dtype) -> None:
    x, weight = case.x.to(dtype).requires_grad_(), case.weight.requires_grad_()
    bias = case.bias.requires_grad_()
    (y,) = bit_linear(x, [weight], [bias])
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    xq, s, q, g = formula(x.detach(), weight.detach())
    dy = grad.double()
    assert_within(x.grad, dy @ q * g, dy.abs() @ q.abs() * g, dtype)
    # Masters keep float32 gradients; the terms are products in the dtype of x.
    of_weight, of_bias = weight.grad, bias.grad
    assert of_weight is not None
    assert of_bias is not None
    assert of_weight.dtype == of_bias.dtype == torch.float32
    assert_within(of_weight.to(dtype), (dy / s).t() @ xq, 2 * (dy / s).abs().t() @ xq.abs(), dtype)
    assert_within(of_bias.to(dtype), dy.sum(dim=0), 2 * dy.abs().sum(dim=0), dtype)


@given(cases(), st.integers(-8, 8))
def test_symmetries(case: Case, exponent: int) -> None:
    """A token is rounded by itself, a sign goes through, and a power of two changes the scale alone."""
    codes, scale = quantize_activation(case.x)
    for row in range(0, len(case.x), 7):
        alone = quantize_activation(case.x[row])
        assert torch.equal(alone.codes, codes[row])
        assert torch.equal(alone.scale, scale[row])
    assert torch.equal(quantize_activation(-case.x).codes, -codes)
    assert torch.equal(quantize_weight(-case.weight).codes, -quantize_weight(case.weight).codes)
    if case.x.abs().amax(dim=-1).min() > 1e-2:
        assert torch.equal(quantize_activation(case.x * 2.0**exponent).codes, codes)


@given(cases())
def test_codes_survive_being_quantised_again(case: Case) -> None:
    codes, scale = quantize_weight(case.weight)
    assert torch.equal(quantize_weight(codes * scale).codes, codes)


@given(cases(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_what_is_not_finite_never_becomes_a_number(case: Case, bad: float, data: Any) -> None:
    x, weight = case.x.clone(), case.weight.clone().requires_grad_()
    row = data.draw(st.integers(0, len(x) - 1))
    x[row, data.draw(st.integers(0, x.shape[1] - 1))] = bad
    (y,) = bit_linear(x, [weight], [case.bias])
    others = torch.arange(len(x)) != row
    assert not y[row].isfinite().any()
    assert y[others].isfinite().all()
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.isfinite().any()
    spoilt = case.weight.clone()
    spoilt[data.draw(st.integers(0, len(spoilt) - 1)), 0] = bad
    (y,) = bit_linear(case.x, [spoilt], [None])
    assert not y.isfinite().any()


@given(cases())
def test_a_gradient_that_is_not_finite_goes_through(case: Case) -> None:
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    (y,) = bit_linear(x, [weight], [None])
    grad = torch.ones_like(y)
    grad[0, 0] = math.nan
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad[0].isnan().all()
    assert x.grad[1:].isfinite().all()
    assert weight.grad[0].isnan().all()
    assert weight.grad[1:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    (y,) = bit_linear(x, [weight], [None])
    assert y.shape == (*shape[:-1], 3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    (flat,) = bit_linear(x.reshape(-1, 5), [weight], [None])
    assert torch.equal(y.flatten(), flat.flatten())


def test_strides_do_not_matter() -> None:
    x, weight = torch.randn(7, 11), torch.randn(13, 11)
    (want,) = bit_linear(x, [weight], [None])
    (got,) = bit_linear(x.t().contiguous().t(), [weight.t().contiguous().t()], [None])
    assert torch.equal(got, want)
