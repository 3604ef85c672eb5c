"""The decoder against transformers' BitNetForCausalLM: the same weights, the same function."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.attention import KVCache
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import quantize_activation, quantize_weight

transformers = pytest.importorskip("transformers")

SHAPES = [
    {"num_attention_heads": heads, "num_key_value_heads": kv, "attention_bias": bias, "hidden_act": act}
    for (heads, kv), bias, act in itertools.product([(4, 4), (4, 2), (4, 1)], [False, True], ["relu2", "silu"])
]


def config(quantize: bool, tie: bool, **shape: Any) -> BitNetConfig:
    return BitNetConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        max_position_embeddings=64,
        rope_theta=10000.0,
        tie_word_embeddings=tie,
        quantize=quantize,
        initializer_range=0.1,
        **shape,
    )


def theirs(ours: BitNetForCausalLM) -> nn.Module:
    """transformers' model with our weights; its linears quantise online where ours do."""
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    json = ours.config.to_json()
    quantization = json.pop("quantization_config", None)
    hf_config = transformers.BitNetConfig(**json, bos_token_id=0, eos_token_id=1, attn_implementation="eager")
    model = transformers.BitNetForCausalLM(hf_config)
    if quantization is not None:
        quantization.pop("quant_method")
        replace_with_bitnet_linear(model.model, [], BitNetQuantConfig(**quantization))
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if ours.config.tie_word_embeddings else [])
    model.tie_weights()
    model.train()
    assert isinstance(model, nn.Module)
    return model


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got is not None
    assert want is not None
    return float(((got - want).norm() / want.norm().clamp(min=1e-12)).item())


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "ternary"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(str(value) for value in shape.values()))
def test_logits_loss_and_gradients(shape: dict[str, Any], quantize: bool) -> None:
    ours = BitNetForCausalLM(config(quantize, tie=shape["hidden_act"] == "relu2", **shape))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    reference = theirs(ours)
    ids = torch.randint(0, 300, (2, 24))
    logits, expected = ours(ids), reference(ids).logits
    # Rounding is chaotic: a last bit that differs flips an activation code, which moves a logit by a hundredth.
    tolerance = 2e-2 if quantize else 1e-5
    assert relative(logits, expected) < tolerance
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss = cross_entropy_sum(ours.model(ids), ours.head_weight, labels) / 46
    expected_loss = reference(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3 if quantize else 1e-5, atol=0)
    loss.backward()
    expected_loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, wanted[name].grad) < (10 * tolerance if quantize else 1e-3), name


@pytest.mark.parametrize("bias", [False, True])
def test_one_bitlinear_has_the_same_codes_outputs_and_gradients(bias: bool) -> None:
    from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant

    ours, reference = BitLinear(96, 40, bias=bias), AutoBitLinear(96, 40, bias=bias, online_quant=True)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(3, 17, 96, requires_grad=True)
    codes, scale = quantize_weight(ours.weight)
    assert torch.equal(codes, (WeightQuant.apply(ours.weight) / scale).round().to(torch.int8))  # type: ignore[no-untyped-call]
    activation = quantize_activation(x)
    assert torch.equal(activation.codes, (ActQuant.apply(x) * activation.scale).round().to(torch.int8))  # type: ignore[no-untyped-call]
    y, expected = ours(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *reference.parameters()])
    for got, want in zip(grads, wanted, strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "ternary"])
def test_the_cache_changes_no_logit(quantize: bool) -> None:
    model = BitNetForCausalLM(config(quantize, True, num_attention_heads=4, num_key_value_heads=2))
    ids = torch.randint(0, 300, (2, 20))
    cache = KVCache()
    parts = [model(ids[:, :7], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids, logits_to_keep=3), model(ids)[:, -3:])


def test_a_document_does_not_see_its_neighbours() -> None:
    model = BitNetForCausalLM(config(True, True, num_attention_heads=4, num_key_value_heads=2))
    ids, documents = torch.randint(0, 300, (1, 20)), torch.tensor([[0] * 8 + [1] * 12])
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model(ids, document_ids=documents, position_ids=positions)
    torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]), rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 300
    again = model(changed, document_ids=documents, position_ids=positions)
    assert torch.equal(again[:, 8:], packed[:, 8:])
    assert not torch.equal(again[:, 3:8], packed[:, 3:8])


def test_embeddings_in_place_of_ids() -> None:
    model = BitNetForCausalLM(config(True, False, num_attention_heads=4, num_key_value_heads=2))
    ids = torch.randint(0, 300, (2, 9))
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)), model(ids))
