"""Attention dropout: what it does to the weights, and that only training has it.

With zero queries every key weighs 1 / n, with values of one the output is the sum of the weights, and with an eps that
dwarfs the mean square the sub-norm is a division by sqrt(eps): the output shows the weights that dropout left.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.model.decoder import BitNetDecoderLayer, BitNetForCausalLM
from bitnet_train.model.rope import rotation
from tests.support import TINY

EPS, SEQ, DROPOUT = 1e8, 16, 0.25
CONFIG = dataclasses.replace(
    TINY,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=8,
    rms_norm_eps=EPS,
    attention_bias=True,
    attention_dropout=DROPOUT,
    quantize=False,
)


def sums_of_weights(training: bool) -> Tensor:
    """The sum of the attention weights of each head, `(batch, seq, heads)`."""
    layer = BitNetDecoderLayer(CONFIG).train(training)
    attention = layer.self_attn
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.v_proj.bias.fill_(1.0)
        nn.init.eye_(attention.o_proj.weight)
        by = rotation(torch.arange(SEQ)[None], CONFIG.head_dim, CONFIG.rope_theta)
        output: Tensor = layer(torch.zeros(256, SEQ, CONFIG.hidden_size), by, None)
    heads: Tensor = output.unflatten(-1, (CONFIG.num_attention_heads, -1))
    return heads[..., 0] * math.sqrt(EPS)


def test_without_training_the_weights_sum_to_one() -> None:
    torch.testing.assert_close(sums_of_weights(False), torch.ones(256, SEQ, 8), rtol=1e-5, atol=0)


def test_training_drops_weights_and_scales_the_rest() -> None:
    """n keys are kept with 1 - p each and weigh 1 / (n (1 - p)): mean 1, variance p / (n (1 - p))."""
    sums = sums_of_weights(True)
    samples = sums[:, 0].numel()
    kept = sums[:, 0] * (1 - DROPOUT)  # the first token has one key
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert kept.mean() == pytest.approx(1 - DROPOUT, abs=5 * (DROPOUT * (1 - DROPOUT) / samples) ** 0.5)
    for keys in range(1, SEQ + 1):
        variance = DROPOUT / (keys * (1 - DROPOUT))
        assert sums[:, keys - 1].mean() == pytest.approx(1.0, abs=5 * (variance / samples) ** 0.5)
        assert sums[:, keys - 1].var() == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_model_has_dropout_in_training_only(quantize: bool) -> None:
    config = dataclasses.replace(CONFIG, rms_norm_eps=1e-5, quantize=quantize)
    model, ids = BitNetForCausalLM(config), torch.randint(0, 97, (2, 12))
    without = BitNetForCausalLM(dataclasses.replace(config, attention_dropout=0.0))
    without.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids), without.train()(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
