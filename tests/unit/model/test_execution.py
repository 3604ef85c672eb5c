"""What only says how to compute changes no number beyond rounding, and does what it says."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitnet_train import fused
from bitnet_train.errors import UserError
from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.bitlinear import BitLinear, forget_codes
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.execution import Execution
from bitnet_train.quant import quantize_weight
from tests.support import TINY

CONFIG = replace(TINY, vocab_size=64, hidden_size=32, intermediate_size=64)
IDS = torch.arange(80).view(2, 40) * 7 % 64
DOCUMENTS = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])


def loss_and_gradients(model: BitNetForCausalLM) -> list[Tensor]:
    loss = cross_entropy_sum(model.model(IDS, document_ids=DOCUMENTS), model.head_weight, IDS)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def kept_bytes(model: BitNetForCausalLM) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(IDS, document_ids=DOCUMENTS)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(how: str) -> None:
    model = BitNetForCausalLM(CONFIG)
    expected, before = loss_and_gradients(model), kept_bytes(model)
    Execution(activation_checkpointing=how).apply(model)
    for got, want in zip(loss_and_gradients(model), expected, strict=True):
        assert torch.equal(got, want)
    assert kept_bytes(model) < 0.9 * before


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    model = BitNetForCausalLM(CONFIG)
    Execution(attention="sdpa").apply(model)
    expected = loss_and_gradients(model)
    Execution(attention="sdpa", compile=True).apply(model)
    assert set(model.state_dict()) == set(BitNetForCausalLM(CONFIG).state_dict())
    for got, want in zip(loss_and_gradients(model), expected, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize(
    ("execution", "micro_batches", "quantised"),
    [(Execution(), 1, 12), (Execution(), 3, 4), (Execution(activation_checkpointing="full"), 1, 4)],
)
def test_weights_are_quantised_once_per_update(
    monkeypatch: pytest.MonkeyPatch, execution: Execution, micro_batches: int, quantised: int
) -> None:
    """Of the 4 groups of a layer (q k v, o, gate up, down): in every pass, or once until codes are forgotten."""
    model = BitNetForCausalLM(CONFIG)
    execution.apply(model, micro_batches)
    stacks = []

    def counted(weights: Sequence[Tensor], scales: Sequence[Tensor | None] | None = None) -> fused.Stacked:
        stacks.append(len(weights))
        return fused.stack(weights, scales)

    monkeypatch.setattr("bitnet_train.model.bitlinear.stack", counted)
    for _ in range(3):
        loss_and_gradients(model)
    assert len(stacks) == 2 * quantised
    forget_codes(model)
    loss_and_gradients(model)
    assert len(stacks) == 2 * (quantised + 4)


def test_kept_codes_follow_the_weight() -> None:
    """A change in place is noticed even without `forget_codes`; `.data` goes unnoticed, hence forget_codes."""
    layer = BitLinear(8, 4, bias=False)
    layer.keeps_codes = True
    before = layer.stacked_with([]).codes
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.stacked_with([]).codes, -before)
    assert layer.stacked_with([]) is layer.stacked_with([])
    for scale in (1.0, -1.0, 1.0):
        layer.load_state_dict({"weight": layer.weight.detach() * scale}, assign=True)
        assert torch.equal(layer.stacked_with([]).codes, quantize_weight(layer.weight).codes)


def test_codes_of_inference_mode_are_not_kept_for_training() -> None:
    model = BitNetForCausalLM(CONFIG)
    Execution().apply(model, micro_batches=2)
    with torch.inference_mode():
        model.model(IDS)
    loss_and_gradients(model)


def test_strength_leads_from_a_dense_layer_to_a_bit_linear() -> None:
    layer, x = BitLinear(64, 32, bias=False), torch.randn(5, 64)
    full = layer(x)
    layer.strength = 0.0
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight))
    layer.strength = 0.999999
    torch.testing.assert_close(layer(x), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", [{"attention": "flash"}, {"activation_checkpointing": "some"}])
def test_other_values_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"execution.{next(iter(option))} must be one of"):
        Execution(**option)  # type: ignore[arg-type]
