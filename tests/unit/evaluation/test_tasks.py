"""Accuracy and exact match against a count by hand, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.evaluation.tasks import evaluate_task
from bitnet_train.generate import complete
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import load_for_inference
from tests.support import TINY, tiny_tokenizer, write_jsonl

Rows = list[dict[str, object]]


def logp(model: BitNetForCausalLM, context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context), the model run on this one alone."""
    with torch.inference_mode():
        logps = model(torch.tensor([context + continuation]))[0].log_softmax(-1)
    return sum(float(logps[len(context) - 1 + i, id]) for i, id in enumerate(continuation))


@pytest.mark.parametrize("chat", [False, True])
def test_multiple_choice_by_hand(master: Path, choices: Rows, tmp_path: Path, chat: bool) -> None:
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    hits = norm_hits = 0
    for row in choices:
        context, texts = str(row["context"]), [str(text) for text in row["choices"]]  # type: ignore[attr-defined]
        ids = tokenizer.begun(tokenizer.encode(context))
        if chat:
            ids = encode_prompt([Message(role="user", content=context)], tokenizer)
        logps = [logp(model, ids, tokenizer.encode(text if chat else f" {text}")) for text in texts]
        hits += max(range(3), key=lambda i: logps[i]) == row["answer"]
        norm_hits += max(range(3), key=lambda i: logps[i] / len(texts[i])) == row["answer"]
    found = evaluate_task(model, tokenizer, str(write_jsonl(tmp_path / "rows.jsonl", choices)), chat)
    error = (hits / 10 * (1 - hits / 10) / 9) ** 0.5
    assert found == {"acc": hits / 10, "acc_norm": norm_hits / 10, "acc_stderr": pytest.approx(error), "rows": 10}
    if not chat:
        assert hits != norm_hits  # else the test could not tell one figure from the other


def test_exact_match_by_hand(master: Path, prompts: Rows, tmp_path: Path) -> None:
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    texts = [complete(model, tokenizer, str(row["prompt"]), chat=False, max_new_tokens=12) for row in prompts]
    hits = sum(text.split(".")[0].strip() == row["answer"] for text, row in zip(texts, prompts, strict=True))
    assert hits >= 1
    found = evaluate_task(model, tokenizer, str(write_jsonl(tmp_path / "rows.jsonl", prompts)), max_new_tokens=12)
    assert (found["rows"], found["exact_match"]) == (10, hits / 10)
    several = [{**row, "answer": ["none", row["answer"]]} for row in prompts]
    assert evaluate_task(model, tokenizer, str(write_jsonl(tmp_path / "rows.jsonl", several)), False, 12) == found
    wrong = [{**row, "stop": ["\n"]} for row in prompts]  # the full stop now belongs to the text
    found = evaluate_task(model, tokenizer, str(write_jsonl(tmp_path / "rows.jsonl", wrong)), False, 12)
    assert found["exact_match"] == 0.0


def test_a_question_takes_the_usual_form_and_an_answer_may_be_a_text(master: Path, tmp_path: Path) -> None:
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    texts: dict[str, object] = {"choices": ["one", "two words", "three"]}
    asked: dict[str, object] = {"context": "On mats.\n", "question": "Who sat? ", **texts, "answer": "three"}
    written: dict[str, object] = {"context": "On mats.\nQuestion: Who sat?\nAnswer:", **texts, "answer": 2}
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [row]) for n, row in enumerate((asked, written))]
    one, other = (evaluate_task(model, tokenizer, str(file)) for file in files)
    assert one == other


GOOD_CHOICE = {"question": "a", "choices": ["b", "c"], "answer": 0}
GOOD_PROMPT = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (GOOD_CHOICE, {"question": None}, "needs a field question or context; add one"),
        (GOOD_CHOICE, {"question": " "}, "question is empty"),
        (GOOD_CHOICE, {"choices": ["b"]}, "choices must be a list of 2 strings or more, got 1 of them"),
        (GOOD_CHOICE, {"choices": "bc"}, "choices must be a list of 2 strings or more, got a string"),
        (GOOD_CHOICE, {"choices": ["b", 3]}, r"choices\[1\] must be a string, got an integer"),
        (GOOD_CHOICE, {"answer": 2}, "answer must be one of the choices, or its number from 0 to 1, got 2"),
        (GOOD_CHOICE, {"answer": True}, "answer must be one of the choices, or its number from 0 to 1, got True"),
        (GOOD_CHOICE, {"answer": "d"}, "answer must be one of the choices, or its number from 0 to 1, got 'd'"),
        (GOOD_CHOICE, {"question": "fox " * 200}, r"the row needs \d+ positions, the context has 128"),
        (GOOD_PROMPT, {"prompt": 3}, "prompt must be a string, got an integer"),
        (GOOD_PROMPT, {"answer": []}, "answer must be a list of 1 strings or more, got 0 of them"),
        (GOOD_PROMPT, {"stop": [""]}, r"stop must be a list of strings that are not empty, got \[''\]"),
        (GOOD_PROMPT, {"choices": ["b", "c"]}, "no field prompt, or choices after rows without"),
        (GOOD_PROMPT, {"prompt": "fox " * 200}, r"the prompt has \d+ tokens, the context 128; shorten it"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, good: dict[str, object], change: dict[str, object], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change})))
    with pytest.raises(UserError, match=f"^{file}:2: .*{message}"):
        evaluate_task(BitNetForCausalLM(TINY).eval(), tiny_tokenizer(), str(file))
