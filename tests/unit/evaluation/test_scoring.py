"""Scores in batches against one request at a time, by hand."""

import pytest
import torch

from bitnet_train.evaluation import scoring
from bitnet_train.evaluation.scoring import Request, request_of, score
from bitnet_train.generate import generate
from bitnet_train.model.decoder import BitNetForCausalLM
from tests.support import TINY, sentence, tiny_tokenizer


@pytest.mark.parametrize("positions", [60, 8192])
def test_scores_are_sums_over_the_continuation(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """In whatever batches; an int8 code on a rounding edge moves the last digits."""
    monkeypatch.setattr(scoring, "_POSITIONS_AT_ONCE", positions)
    model = BitNetForCausalLM(TINY).eval()
    requests = [Request([1, *range(5, 7 + 4 * n)], [(31 * n + i) % 300 for i in range(1 + n % 3)]) for n in range(8)]
    greedy = Request([1, 5, 9], list(generate(model, [1, 5, 9], stop_ids=(), max_new_tokens=4)))
    requests.insert(3, greedy)
    found = score(model, requests)
    for (context, continuation), (logp, _) in zip(requests, found, strict=True):
        logps = model(torch.tensor([[*context, *continuation]]))[0].log_softmax(-1)
        expected = sum(logps[len(context) - 1 + i, id].item() for i, id in enumerate(continuation))
        assert logp == pytest.approx(expected, rel=1e-3)
    assert [is_greedy for _, is_greedy in found] == [request is greedy for request in requests]


def test_batches_hold_equal_lengths_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_POSITIONS_AT_ONCE", 20)
    assert list(scoring._batches([3, 10, 4, 9, 50, 2])) == [[4], [1, 3], [2, 0, 5]]
    assert list(scoring._batches([])) == []


def test_a_request_is_the_document_that_holds_both_texts() -> None:
    tokenizer = tiny_tokenizer()
    text, more = sentence(1), sentence(2)
    for context, continuation in [(text, f" {more}"), (f"{text} ", more), (f"{text}  \n", more)]:
        request = request_of(tokenizer, context, continuation)
        assert request.context == [tokenizer.bos_token_id, *tokenizer.encode(text)]
        assert request.context[1:] + request.continuation == tokenizer.encode(context + continuation)
    assert request_of(tokenizer, "", more) == ([tokenizer.bos_token_id], tokenizer.encode(more))


def test_where_a_token_reaches_over_the_border_the_texts_are_tokenized_apart() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer.encode("quick")) < len(tokenizer.encode("qui")) + len(tokenizer.encode("ck"))
    request = request_of(tokenizer, "qui", "ck")
    assert request == ([tokenizer.bos_token_id, *tokenizer.encode("qui")], tokenizer.encode("ck"))
