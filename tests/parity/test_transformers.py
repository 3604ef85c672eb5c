"""The decoder against transformers' BitNetForCausalLM over its configuration space: the same weights, one function."""

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch

from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.attention import KVCache
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.rope import RopeScaling
from bitnet_train.quant import quantize_activation, quantize_weight

pytest.importorskip("transformers")

from tests.parity.reference import bitlinear_inputs, quiet_ids, randomize, relative, theirs

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
ROPE: list[dict[str, Any]] = [
    {"rope_theta": 10000.0},
    {"rope_theta": 500000.0, "rope_scaling": RopeScaling("linear", 4.0)},
    {"rope_theta": 500.0, "rope_scaling": RopeScaling("yarn", 8.0, 16)},
    {"rope_theta": 1000.0, "rope_scaling": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)},
    {"rope_theta": 777.0, "rope_scaling": RopeScaling("yarn", 4.0, 8, attention_factor=1.3, beta_fast=8.0)},
]
OTHERS = [  # odd vocabularies and feed-forward sizes, eps and initial weights of other magnitudes
    {"vocab_size": 301, "intermediate_size": 96, "rms_norm_eps": 1e-5, "initializer_range": 0.1},
    {"vocab_size": 97, "intermediate_size": 100, "rms_norm_eps": 1e-6, "initializer_range": 0.02},
    {"vocab_size": 128, "intermediate_size": 83, "rms_norm_eps": 1e-2, "initializer_range": 0.5},
]


def combinations() -> list[Any]:
    """All of heads, biases, head and activation, each with the next of the positions and of the rest."""
    rope, others, found = cycle(ROPE), cycle(OTHERS), []
    for (name, heads), bias, tied, act in product(HEADS.items(), (False, True), (False, True), ("relu2", "silu")):
        fields = {"attention_bias": bias, "tie_word_embeddings": tied, "hidden_act": act, **next(rope), **next(others)}
        scaling = fields.get("rope_scaling")
        words = [name, "bias" if bias else "", "tied" if tied else "", act, scaling.rope_type if scaling else "default"]
        values = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], **fields}
        found.append(pytest.param(values, id="-".join(filter(None, words))))
    return found


def random_model(**fields: Any) -> BitNetForCausalLM:
    """Two layers of 64 features; biases and gains are random too."""
    config = BitNetConfig(**{"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64, **fields})
    model = BitNetForCausalLM(config)
    randomize(model)
    return model


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    """Runs transformers' functions as they are written: compiling them takes longer than all tests together."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", ["dense", "ternary", "ternary without C++"])
@pytest.mark.parametrize("fields", combinations())
def test_logits_loss_and_gradients(fields: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: logits within 1e-4, loss and every gradient within 1e-3 of their size."""
    quantize = kind != "dense"
    if kind == "ternary without C++":
        monkeypatch.setattr("bitnet_train.kernels.native.library", lambda: None)
    ours = random_model(quantize=quantize, **fields)
    reference = theirs(ours)
    ids = quiet_ids(reference, 2, 5 if quantize else 24)
    expected = reference(ids, labels=ids)
    assert relative(ours(ids), expected.logits) < 1e-4
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss = cross_entropy_sum(ours.model(ids), ours.head_weight, labels) / labels.ge(0).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-3, atol=0)
    loss.backward()
    expected.loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, wanted[name].grad) < 1e-3, name


@pytest.mark.parametrize("fields", combinations())
def test_every_code_is_the_one_of_transformers(fields: dict[str, Any]) -> None:
    from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant

    reference = theirs(random_model(**fields))
    layers = {name: module for name, module in reference.named_modules() if isinstance(module, AutoBitLinear)}
    with bitlinear_inputs(reference) as inputs:
        reference(torch.randint(0, fields["vocab_size"], (2, 24)))
    assert len(inputs) == 14
    for name, x in inputs.items():
        codes, scale = quantize_weight(layers[name].weight)
        assert torch.equal(codes, (WeightQuant.apply(layers[name].weight) / scale).round().to(torch.int8))  # type: ignore[no-untyped-call]
        activation = quantize_activation(x)
        assert torch.equal(activation.codes, (ActQuant.apply(x) * activation.scale).round().to(torch.int8))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bias", [False, True])
def test_one_bitlinear_has_the_same_codes_outputs_and_gradients(bias: bool) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    ours, reference = BitLinear(96, 40, bias=bias), AutoBitLinear(96, 40, bias=bias, online_quant=True)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(3, 17, 96, requires_grad=True)
    y, expected = ours(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *reference.parameters()])
    for got, want in zip(grads, wanted, strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "ternary"])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("heads", HEADS)
def test_the_cache_changes_no_logit(heads: str, rope: dict[str, Any], quantize: bool) -> None:
    model = random_model(
        quantize=quantize,
        vocab_size=97,
        intermediate_size=96,
        num_attention_heads=HEADS[heads][0],
        num_key_value_heads=HEADS[heads][1],
        **rope,
    ).eval()
    ids, cache = quiet_ids(theirs(model), 1, 10), KVCache()
    with torch.no_grad():
        parts = [model(ids[:, :4], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(4, 10)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-5, atol=1e-5)
    assert cache.length == 10


def tiny(**fields: Any) -> BitNetForCausalLM:
    return random_model(vocab_size=97, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, **fields)


def test_logits_to_keep() -> None:
    model, ids = tiny(), torch.randint(0, 97, (2, 9))
    assert torch.equal(model(ids, logits_to_keep=3), model(ids)[:, -3:])


def test_embeddings_in_place_of_ids() -> None:
    model, ids = tiny(), torch.randint(0, 97, (2, 9))
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)), model(ids))
