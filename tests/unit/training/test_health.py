"""The ternary health of a small model, against figures counted in another way."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.data.batches import TokenBatch
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import quantize_weight
from bitnet_train.training.health import NAMES, TernaryHealth, flips, pack
from tests.support import TINY

LAYERS = ("health/layers.0/", "health/layers.1/", "health/")


def batch() -> TokenBatch:
    ids = torch.randint(0, TINY.vocab_size, (2, 24))
    positions = torch.arange(24).expand(2, -1)
    return TokenBatch(ids, ids, positions, torch.zeros_like(ids))


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(TINY)


def matrices(model: BitNetForCausalLM, layer: int) -> list[Tensor]:
    return [p for name, p in model.model.layers[layer].named_parameters() if name.endswith("proj.weight")]


def test_every_layer_and_all_of_them_have_every_figure(model: BitNetForCausalLM) -> None:
    health = TernaryHealth(1)
    health.start(model)
    figures = health.measure(model, batch())
    assert set(figures) == {prefix + name for prefix in LAYERS for name in NAMES}


def test_shares_scale_and_distance_are_those_of_the_codes(model: BitNetForCausalLM) -> None:
    figures = TernaryHealth(1).measure(model, batch())
    ternary = [quantize_weight(matrix) for matrix in matrices(model, 1)]
    codes = torch.cat([weight.codes.flatten() for weight in ternary])
    for name, code in (("minus", -1), ("zero", 0), ("plus", 1)):
        assert figures[f"health/layers.1/{name}"] == pytest.approx(float((codes == code).double().mean()))
    scales = torch.stack([weight.scale for weight in ternary])
    assert figures["health/layers.1/scale"] == pytest.approx(float(scales.mean()), rel=1e-5)
    pairs = zip(matrices(model, 1), ternary, strict=True)
    distances = torch.cat([(matrix.detach().abs() / t.scale - 0.5).abs().flatten() for matrix, t in pairs])
    assert figures["health/layers.1/threshold_distance"] == pytest.approx(float(distances.mean()), rel=1e-5)
    both = [figures[f"{prefix}zero"] for prefix in LAYERS]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2)  # layers of one size


def test_flips_are_counted_since_the_last_measurement(model: BitNetForCausalLM) -> None:
    health = TernaryHealth(1)
    health.start(model)
    assert health.measure(model, batch())["health/flip_rate"] == 0.0
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight[0, :8] *= -1  # as large as before: the scale stays, and what is not 0 changes its sign
    flipped = int((quantize_weight(weight).codes[0, :8] != 0).sum())
    figures = health.measure(model, batch())
    count = sum(matrix.numel() for matrix in matrices(model, 0))
    assert flipped > 0
    assert figures["health/layers.0/flip_rate"] == pytest.approx(flipped / count)
    assert figures["health/layers.1/flip_rate"] == 0.0
    assert figures["health/flip_rate"] == pytest.approx(flipped / count / 2)
    assert health.measure(model, batch())["health/flip_rate"] == 0.0


def test_activations_are_those_that_the_linears_read(model: BitNetForCausalLM) -> None:
    """A norm's gain of 0 but for one feature: every token has one code of +-127 and zeros."""
    with torch.no_grad():
        norm = model.get_parameter("model.layers.0.input_layernorm.weight")
        norm.zero_()
        norm[3] = 1000.0
    before = TernaryHealth(1).measure(BitNetForCausalLM(TINY), batch())
    figures = TernaryHealth(1).measure(model, batch())
    assert figures["health/layers.0/activation_absmax"] > 100 > before["health/layers.0/activation_absmax"]
    assert figures["health/activation_absmax"] == figures["health/layers.0/activation_absmax"]
    assert 0.0 < figures["health/layers.0/activation_saturation"] < 0.1


def test_measuring_leaves_no_trace(model: BitNetForCausalLM) -> None:
    tokens = batch()
    model.train()
    before, state = model(tokens.input_ids), torch.get_rng_state()
    TernaryHealth(1).measure(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(model(tokens.input_ids), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_quantisation_there_are_no_codes_and_no_flips() -> None:
    dense = BitNetForCausalLM(replace(TINY, quantize=False))
    health = TernaryHealth(1)
    health.start(dense)
    assert health.measure(dense, batch()) == {}


def test_it_is_due_every_few_steps_or_never() -> None:
    assert [step for step in range(1, 9) if TernaryHealth(3).is_due(step)] == [3, 6]
    assert not any(TernaryHealth(0).is_due(step) for step in range(9))


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), min_size=1, max_size=50))
def test_flips_count_the_codes_that_differ(pairs: list[tuple[int, int]]) -> None:
    before, after = (torch.tensor([codes], dtype=torch.int8) for codes in zip(*pairs, strict=True))
    assert flips(pack(before), pack(after)) == sum(a != b for a, b in pairs)
    assert pack(before).shape == (1, -(-len(pairs) // 4))
