"""Sampling: what temperature and top-p do, and where generation ends."""

import math

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.generate import Sampling, complete, generate, sample, until
from bitnet_train.model.decoder import BitNetForCausalLM
from tests.support import TINY, tiny_tokenizer


def draws(logits: list[float], temperature: float, top_p: float) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    how = Sampling(temperature, top_p)
    return {sample(torch.tensor(logits), how, generator) for _ in range(200)}


def test_temperature_and_top_p_decide_what_can_be_drawn() -> None:
    logits = [0.0, 2.0, 1.9, -9.0]
    assert draws(logits, temperature=0.0, top_p=1.0) == {1}
    assert draws(logits, temperature=1.0, top_p=0.4) == {1}
    assert draws(logits, temperature=1.0, top_p=0.6) == {1, 2}
    assert draws(logits, temperature=50.0, top_p=1.0) == {0, 1, 2, 3}


def test_the_smallest_temperature_is_greedy() -> None:
    assert draws([0.5, 60.0, 59.0, -1000.0], temperature=5e-324, top_p=1.0) == {1}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"top_p": math.nan}, r"top_p must lie in \(0, 1\], got nan"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_no_number_draws_from_nothing(how: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**how)


def test_greedy_generation_is_the_argmax_of_the_whole_sequence() -> None:
    model = BitNetForCausalLM(TINY).eval()
    ids = [5, 9, 2]
    new = list(generate(model, ids, stop_ids=(), max_new_tokens=6))
    for token in new:
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)
    assert len(new) == 6
    assert list(generate(model, [5, 9, 2], stop_ids=(new[2],), max_new_tokens=6)) == new[: new.index(new[2])]


def test_generation_ends_with_the_context() -> None:
    model = BitNetForCausalLM(TINY).eval()
    prompt = [1] * (TINY.max_position_embeddings - 2)
    assert len(list(generate(model, prompt, stop_ids=(), max_new_tokens=50))) == 2
    with pytest.raises(UserError, match="the context 128; shorten it"):
        complete(model, tiny_tokenizer(), "lazy wizards " * 100, chat=False, max_new_tokens=1)


def test_the_same_seed_gives_the_same_text() -> None:
    model, tokenizer = BitNetForCausalLM(TINY).eval(), tiny_tokenizer()
    texts = [complete(model, tokenizer, "quick", True, 8, Sampling(temperature=1.0), seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_is_cut_at_the_first_stop_string_and_no_piece_is_read_after_it() -> None:
    pieces = iter(["one t", "wo\n", "three", "four"])
    assert until(pieces, ["\n\n", "wo"]) == "one t"
    assert list(pieces) == ["three", "four"]
    assert until(["all of ", "it"], ["\n"]) == "all of it"
