"""Preference pairs: one prompt, the answer that people preferred and the one that they did not.

    explicit    {"prompt", "chosen", "rejected"}      chosen and rejected may repeat the prompt
    implicit    {"chosen", "rejected"}                the prompt is what both begin with

Each is a string, a message or a list of messages. The prompt may also be called "conversations" (ShareGPT), and beside
answers that stand without it "question", "query", "instruction" with "input" and "history" (Alpaca), "messages"
(axolotl). Strings in the form of
Anthropic's transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ...", are read as messages.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitnet_train.data.conversation import (
    BESIDE,
    Message,
    as_message,
    as_messages,
    check_fields,
    check_order,
    instruction_of,
    names_of,
    unread,
    with_system,
)
from bitnet_train.data.readers import Fields
from bitnet_train.data.sources import Row, located
from bitnet_train.errors import UserError

_USUAL = ("prompt", "conversations")
_PROMPTS = {  # the names of a prompt, the first that a row has, and what is read with it
    **{name: (name,) for name in (*_USUAL, "question", "query")},
    "instruction": ("instruction", "input", "history"),
    "input": ("input",),
    "messages": ("messages",),
}
_ANSWERS = ("chosen", "rejected")
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_WORDS = 3  # a column with so many may be the prompt of answers that stand without one


@dataclass(frozen=True)
class Pair:
    """A prompt, which ends with a user's or a tool's message, and two different answers, one assistant message each."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def pair_of(row: Row) -> Pair:
    """The preference pair of a row.

    Raises:
        UserError: a field is missing, empty or no text; the answers are equal, or not one assistant message each; the
            prompt does not end with a message of user or tool; NUL bytes or lone surrogates.
    """
    with located(row):
        fields = row.fields
        check_fields(fields)
        for field in _ANSWERS:
            if fields.get(field) is None:
                raise UserError(f"no field {field!r}; the row has {names_of(fields)}")
        name = _prompt_name(fields)
        return _checked(_implicit(fields) if name is None else _explicit(fields, name))


def unread_of_pair(fields: Fields) -> Iterator[str]:
    """The names of fields that mean nothing here, of a row that `pair_of` has read."""
    name = _prompt_name(fields)
    prompt = () if name is None else _PROMPTS[name]
    return unread(fields, {*_ANSWERS, *prompt, *BESIDE}, (*_ANSWERS, *prompt))


def _prompt_name(fields: Fields) -> str | None:
    """The field that is the prompt: one of the usual names, or another where the answers stand without their prompt."""
    names = _USUAL if _begins_with_prompt(fields["chosen"]) else _PROMPTS
    return next((name for name in names if fields.get(name) is not None), None)


def _begins_with_prompt(answer: object) -> bool:
    """Whether an answer is a whole conversation."""
    if isinstance(answer, str):
        return bool(_TRANSCRIPT_TURN.match(answer))
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt")


def _explicit(fields: Fields, name: str) -> Pair:
    asked = instruction_of(fields) if name == "instruction" else _messages("user", fields[name], name)
    prompt = with_system(fields, asked)
    chosen, rejected = (_messages("assistant", fields[field], field) for field in ("chosen", "rejected"))
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Pair(prompt, chosen, rejected)
    whole = _split_messages(with_system(fields, chosen), with_system(fields, rejected))
    if whole.prompt[-len(prompt) :] != prompt:
        raise UserError(
            f"chosen and rejected repeat another prompt than the field {name}; make them agree or drop the row"
        )
    return whole


def _implicit(fields: Fields) -> Pair:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and not _TRANSCRIPT_TURN.match(chosen):
        return _split_strings(fields, chosen, rejected)
    return _split_messages(
        *(with_system(fields, _messages("assistant", fields[field], field)) for field in ("chosen", "rejected"))
    )


def _messages(role: str, value: object, field: str) -> list[Message]:
    if isinstance(value, str) and _TRANSCRIPT_TURN.match(value):
        turns = _TRANSCRIPT_TURN.split(value)[1:]  # role, text, role, text, ...
        if role == "user" and turns[-2] == "Assistant" and not turns[-1].strip():
            turns = turns[:-2]  # a prompt that ends where the answer begins
        named = zip(turns[::2], turns[1::2], strict=True)
        return [as_message(_TRANSCRIPT_ROLES[name], text.strip(), field) for name, text in named]
    return as_messages(role, [value] if isinstance(value, Mapping) else value, field)


def _split_messages(chosen: list[Message], rejected: list[Message]) -> Pair:
    shared = _shared(chosen, rejected)
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _split_strings(fields: Fields, chosen: str, rejected: str) -> Pair:
    """The prompt is the shared beginning, back to its last white space."""
    for name in unread_of_pair(fields):
        value = fields.get(name)
        if isinstance(value, str) and len(value.split()) >= _WORDS:
            raise UserError(
                f"chosen and rejected stand without a prompt, and {name} may be it; call that field prompt (or drop "
                "it, if the prompt is what both answers begin with)"
            )
    words = chosen[: _shared(chosen, rejected)]
    shared = len(words) - len(re.split(r"\s", words)[-1])
    prompt = as_message("user", chosen[:shared], "the prompt, what chosen and rejected both begin with,")
    answer, other = (
        as_message("assistant", text[shared:], name) for text, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
    return Pair(with_system(fields, [prompt]), [answer], [other])


def _shared(left: Sequence[object], right: Sequence[object]) -> int:
    """How many elements two sequences have in common from the start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def _checked(pair: Pair) -> Pair:
    check_order(pair.prompt)
    if _said(pair.chosen) == _said(pair.rejected):
        raise UserError("chosen and rejected are equal, so there is nothing to prefer; drop the row")
    for field, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if [message["role"] for message in answer] != ["assistant"]:
            roles = ", ".join(message["role"] for message in answer) or "nothing"
            raise UserError(f"{field} must be one assistant message after the shared prompt, got {roles}; drop the row")
    if not pair.prompt or pair.prompt[-1]["role"] not in ("user", "tool"):
        raise UserError("the prompt must end with a user message; add it as the field prompt, or drop the row")
    return pair


def _said(answer: Sequence[Message]) -> list[object]:
    names = ("tool_calls", "reasoning_content")
    return [(message["content"].strip(), *map(message.get, names)) for message in answer]
