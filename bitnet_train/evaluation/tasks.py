"""Questions with known answers, from local files of one row a question.

    {"question" | "context", "choices", "answer"}    the likeliest choice against the right one
    {"prompt", "answer", "stop"}                     what the model writes, greedily, against the answer

A context is continued as it is; a question becomes "Question: ...\\nAnswer:", after the context if the row has both.
One blank and the choice follow. `answer` is the number of a choice, from 0, or its text; of a prompt, the text or a
list of them. The model writes until one of `stop` ("\\n" where the row names none), a stop token, or enough tokens.

    acc          the choice with the highest log p is right                     as in lm-evaluation-harness
    acc_norm     the choice with the highest log p / characters is right
    exact_match  the text without white space around it is an answer

The figures are shares of `rows`, their number; NAME_stderr is the standard error of a share.

As a chat, contexts and prompts are the user's message, choices are answers, and "\\n" stops none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_train.data.chat import encode_answer
from bitnet_train.data.conversation import Message, check_text
from bitnet_train.data.sources import Row, located, read_rows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.evaluation.scoring import Request, check_fits, request_of, score
from bitnet_train.formats.json_file import type_name
from bitnet_train.generate import prompt_ids_of, stream, until
from bitnet_train.model.decoder import BitNetForCausalLM

Figures = dict[str, float]


@dataclass(frozen=True)
class MultipleChoice:
    """A text to continue, what may follow, and the number of what should."""

    context: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Generation:
    """A text to continue, the texts that are right, and the strings that end the model's text, if the row names any."""

    prompt: str
    answers: list[str]
    stop: list[str] | None


def evaluate_task(
    model: BitNetForCausalLM, tokenizer: Tokenizer, path: str, chat: bool = False, max_new_tokens: int = 64
) -> Figures:
    """The figures of a task; its first row says of which kind it is.

    Args:
        path: a file, a glob, a folder or a hub id of rows.
        chat: texts are sent through the chat template.
        max_new_tokens: of a generated text.

    Raises:
        UserError: a row is of neither kind or not of the first one's, or longer than the context.
    """
    rows = list(read_rows(path))
    if "choices" in rows[0].fields:
        return _choose(model, tokenizer, rows, chat)
    return _generate(model, tokenizer, rows, chat, max_new_tokens)


def choice_of(row: Row) -> MultipleChoice:
    """The multiple choice of a row. Raises UserError that names the row and the field."""
    with located(row):
        fields = row.fields
        choices = _texts(fields.get("choices"), "choices", at_least=2)
        parts = [check_text(fields["context"], "context").rstrip()] if fields.get("context") is not None else []
        if fields.get("question") is not None:
            parts.append(f"Question: {check_text(fields['question'], 'question').strip()}\nAnswer:")
        if not parts:
            raise UserError("a multiple choice needs a field question or context; add one")
        return MultipleChoice("\n".join(parts), choices, _index(fields.get("answer"), choices))


def generation_of(row: Row) -> Generation:
    """The prompt and the answers of a row. Raises UserError that names the row and the field."""
    with located(row):
        fields = row.fields
        if "choices" in fields or "prompt" not in fields:
            raise UserError(f"no field prompt, or choices after rows without; the row has {', '.join(fields)}")
        answer, stop = fields.get("answer"), fields.get("stop")
        answers = _texts(answer if isinstance(answer, list) else [answer], "answer", at_least=1)
        if stop is not None and (not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop)):
            raise UserError(f"stop must be a list of strings that are not empty, got {stop!r}")
        return Generation(check_text(fields.get("prompt"), "prompt"), answers, stop)


def _texts(value: object, field: str, at_least: int) -> list[str]:
    if not isinstance(value, list) or len(value) < at_least:
        got = f"{len(value)} of them" if isinstance(value, list) else type_name(value)
        raise UserError(f"{field} must be a list of {at_least} strings or more, got {got}")
    return [check_text(text, f"{field}[{index}]").strip() for index, text in enumerate(value)]


def _index(answer: object, choices: Sequence[str]) -> int:
    if isinstance(answer, str) and answer.strip() in choices:
        return choices.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise UserError(f"answer must be one of the choices, or its number from 0 to {len(choices) - 1}, got {answer!r}")


def _choose(model: BitNetForCausalLM, tokenizer: Tokenizer, rows: Sequence[Row], chat: bool) -> Figures:
    items = [choice_of(row) for row in rows]
    requests: list[Request] = []
    for row, item in zip(rows, items, strict=True):
        with located(row):
            for request in _choice_requests(tokenizer, item, chat):
                check_fits(model, request)
                requests.append(request)
    logps = iter([found.logp for found in score(model, requests)])
    acc = norm = 0
    for item in items:
        of_choices = [next(logps) for _ in item.choices]
        per_character = [logp / len(choice) for logp, choice in zip(of_choices, item.choices, strict=True)]
        acc += of_choices.index(max(of_choices)) == item.answer
        norm += per_character.index(max(per_character)) == item.answer
    n = len(items)
    return {"acc": acc / n, "acc_norm": norm / n, "acc_stderr": _standard_error(acc, n), "rows": n}


def _choice_requests(tokenizer: Tokenizer, item: MultipleChoice, chat: bool) -> list[Request]:
    if not chat:
        return [request_of(tokenizer, item.context, f" {choice}") for choice in item.choices]
    messages = [Message(role="user", content=item.context)]
    return [Request(*encode_answer(messages, choice, tokenizer)) for choice in item.choices]


def _generate(
    model: BitNetForCausalLM, tokenizer: Tokenizer, rows: Sequence[Row], chat: bool, max_new_tokens: int
) -> Figures:
    items = [generation_of(row) for row in rows]
    texts = []
    for row, item in zip(rows, items, strict=True):
        with located(row):  # `stream` checks the length at once and generates when it is read
            texts.append(stream(model, tokenizer, prompt_ids_of(tokenizer, item.prompt, chat), max_new_tokens))
    default = [] if chat else ["\n"]
    stops = [default if item.stop is None else item.stop for item in items]
    found = [until(text, stop).strip() for text, stop in zip(texts, stops, strict=True)]
    hits = sum(text in item.answers for text, item in zip(found, items, strict=True))
    n = len(items)
    return {"exact_match": hits / n, "exact_match_stderr": _standard_error(hits, n), "rows": n}


def _standard_error(hits: int, rows: int) -> float:
    """Of the mean of `rows` zeros and ones: sqrt(p (1 - p) / (rows - 1)); 0 for one row."""
    share = hits / rows
    return math.sqrt(share * (1 - share) / max(rows - 1, 1))
