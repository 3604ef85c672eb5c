"""Decoders of which a rank makes its rows alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.skeleton import own_rows
from bitnet_train.training.sharding import share
from tests.support import TINY

CONFIG = replace(TINY, vocab_size=101, hidden_size=32, intermediate_size=67, attention_bias=True)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_ranks_draw_the_rows_of_a_single_process(count: int) -> None:
    torch.manual_seed(1)
    whole, then = BitNetForCausalLM(CONFIG), torch.rand(1)
    for rank in range(count):
        rows = partial(share, rank=rank, count=count)
        torch.manual_seed(1)
        with own_rows(rows):
            model = BitNetForCausalLM(CONFIG)
        assert torch.equal(torch.rand(1), then)
        for own, parameter in zip(model.parameters(), whole.parameters(), strict=True):
            mine = rows(len(parameter))
            assert torch.equal(own[mine.start : mine.stop], parameter[mine.start : mine.stop])


def test_ranks_copy_their_rows_alone() -> None:
    weight = torch.nn.Parameter(torch.zeros(5, 2))
    with own_rows(partial(share, rank=1, count=3)), torch.no_grad():
        weight.copy_(torch.arange(10.0, dtype=torch.bfloat16).view(5, 2))
    assert weight.tolist() == [[0, 0], [0, 0], [4, 5], [6, 7], [0, 0]]
