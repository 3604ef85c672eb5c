"""Likelihood against a count by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.model.decoder import BitNetForCausalLM
from tests.support import TINY, chat_rows, text_rows, tiny_tokenizer, write_jsonl


def test_text_by_hand(tmp_path: Path) -> None:
    model, tokenizer = BitNetForCausalLM(TINY).eval(), tiny_tokenizer()
    rows = text_rows(3)
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(str(row["text"])), tokenizer.eos_token_id])
        total -= model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    size = sum(len(str(row["text"])) for row in rows)
    found = evaluate(model, tokenizer, str(write_jsonl(tmp_path / "text.jsonl", rows)))
    assert (found["tokens"], found["bytes"]) == (tokens, size)
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-3)  # a flipped int8 code moves the last digits
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["bits_per_byte"] == pytest.approx(found["nll"] * tokens / math.log(2) / size)


def test_of_conversations_the_answers_count(tmp_path: Path) -> None:
    rows = chat_rows(2)
    model, tokenizer = BitNetForCausalLM(TINY).eval(), tiny_tokenizer()
    found = evaluate(model, tokenizer, str(write_jsonl(tmp_path / "chat.jsonl", rows)))
    answers = [str(row["messages"][1]["content"]) for row in rows]  # type: ignore[index]
    assert found["tokens"] == sum(len(tokenizer.encode(answer)) + 1 for answer in answers)
    assert found["bytes"] == sum(map(len, answers))


@pytest.mark.parametrize("context", [1 << 17, 10**15])
def test_a_context_beyond_memory_is_but_a_number(tmp_path: Path, context: int) -> None:
    config = replace(TINY, max_position_embeddings=context)
    for rows in (text_rows(2), chat_rows(2)):
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        assert evaluate(BitNetForCausalLM(config), tiny_tokenizer(), str(file))["tokens"] > 0


def test_a_context_that_the_model_lacks(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "text.jsonl", text_rows(1))
    with pytest.raises(UserError, match=r"--sequence-length must be at most the context \(128\), got 129"):
        evaluate(BitNetForCausalLM(TINY), tiny_tokenizer(), str(file), sequence_length=129)
