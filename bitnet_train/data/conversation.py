"""Rows to conversations: the shapes that people have, and what becomes of every field.

    {"messages": [{"role", "content"}]}                      {"conversations": [{"from", "value"}]} (ShareGPT)
    {"instruction", "input", "output", "history"} (Alpaca)   {"prompt", "completion"}, strings or message lists

A field "system" or "system_prompt" beside any of them comes first, a field "tools" reaches the chat template. A field
that means something is used or refused; one that means nothing to training (id, source, score) is told (`unread`), so
that nobody believes that it was used.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

from bitnet_train.data.parts import checked_characters
from bitnet_train.data.readers import Fields, check_depth
from bitnet_train.data.sources import Row, located
from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import MAX_DEPTH, type_name

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},  # ShareGPT
}
_FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # in the order in which transformers looks for it
_FLAGS = ("weight", "train", "training", "loss")  # OpenAI and mistral-finetune; axolotl, both; ms-swift
_OF_MESSAGES = {"tool_calls", "name", "tool_call_id", *_REASONING, *_FLAGS}
_TEXT_ALONE = "the model reads text alone; drop the row"
_REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ALONE),
    "functions": "that is OpenAI's old name; call the field tools, and the calls tool_calls",
    "function_call": "that is OpenAI's old name; call the field tool_calls",
    "documents": "templates get no documents here; write them into a message",
    "chat_template_kwargs": "templates get no variables of a row; write what they choose into the chat template",
    "train_detail": "an answer is trained whole or not at all; drop the field",
}


class Message(TypedDict):
    """One turn of a conversation; role is system, user, assistant or tool. A message with tool_calls may be empty."""

    role: str
    content: str
    reasoning_content: NotRequired[str]  # what an assistant thinks before it answers
    tool_calls: NotRequired[list[object]]  # of an assistant, as transformers' templates know them
    name: NotRequired[str]  # of a tool's answer
    tool_call_id: NotRequired[str]  # likewise
    train: NotRequired[bool]  # false: an answer that carries no loss


class Shape(NamedTuple):
    """Rows of one kind: the fields that they have, those that they may have, and how a conversation is made of them."""

    fields: tuple[str, ...]
    options: tuple[str, ...]
    read: Callable[[Fields], list[Message]]


def _listed(name: str) -> Shape:
    return Shape((name,), (), lambda fields: parse_messages(fields[name], name))


def _alpaca(fields: Fields) -> list[Message]:
    return [*instruction_of(fields), as_message("assistant", fields["output"], "output")]


def _completed(fields: Fields) -> list[Message]:
    prompt, completion = fields["prompt"], fields["completion"]
    return [*as_messages("user", prompt, "prompt"), *as_messages("assistant", completion, "completion")]


SHAPES = (  # the first whose fields are there and not null
    _listed("messages"),
    _listed("conversations"),
    Shape(("instruction", "output"), ("input", "history"), _alpaca),
    Shape(("prompt", "completion"), (), _completed),
)
BESIDE = {"system", "system_prompt", "tools"}
_VERDICTS = ("label", "kto_tag")  # of a completion: TRL's and LLaMA-Factory's names in KTO's rows


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row.

    Raises:
        UserError: no known shape; empty, null or non-text content; an unknown role; a system message that is not first;
            turns out of order; no assistant message; NUL bytes or lone surrogates; a field that means something which
            is not done here.
    """
    with located(row):
        fields = row.fields
        check_fields(fields)
        for name in _VERDICTS:
            if _verdict(fields.get(name)) is False:
                raise UserError(f"{name} is false: this completion is one that nobody should learn; drop such rows")
        messages = with_system(fields, _shape_of(fields).read(fields))
        check_order(messages)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError("the conversation has no assistant message, so there is nothing to learn; drop the row")
        return messages


def _verdict(value: object) -> bool | None:
    """Whether a completion is desirable, as KTO's rows say it; None for a value that says something else."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return known.get(str(value).lower())


def unread(fields: Fields, read: set[str], lists: Sequence[str] = ()) -> Iterator[str]:
    """The names of fields that mean nothing here.

    Args:
        read: names of fields that are used.
        lists: those of them that may hold messages, whose own fields are looked at, too.
    """
    yield from (name for name, value in fields.items() if name not in read and value is not None)
    for name in lists:
        value = fields.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, Mapping):
                known = _OF_MESSAGES.union(_keys_of(entry))
                yield from (f"{name}[].{key}" for key, part in entry.items() if key not in known and part is not None)


def unread_of_conversation(fields: Fields) -> Iterator[str]:
    """`unread` of a row that `messages_of` has read."""
    shape = _shape_of(fields)
    verdicts = {name for name in _VERDICTS if _verdict(fields.get(name)) is not None}
    return unread(fields, {*shape.fields, *shape.options, *BESIDE, *verdicts}, shape.fields)


def check_fields(fields: Mapping[str, object]) -> None:
    """Refuses a row or a message with a field that means something which is not done here."""
    for name in _REFUSED.keys() & fields.keys():
        if fields[name]:
            raise UserError(f"{name}: {_REFUSED[name]}")


def tools_of(row: Row) -> list[object] | None:
    """The functions that the row's field "tools" offers, as JSON schemas; None where there are none.

    Raises:
        UserError: neither a list of objects nor the JSON of one.
    """
    with located(row):
        value = row.fields.get("tools") or None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UserError(f"tools is no JSON ({error}); write a list of functions") from None
            check_depth(value, "tools")
        if isinstance(value, list):  # of objects, or of the JSON of each
            value = [_json_object(tool) or tool for tool in value]
        if value is not None and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
            raise UserError(f"tools must be a list of objects, or the JSON of one, got {type_name(value)}")
        return value or None


def _shape_of(fields: Fields) -> Shape:
    present = {name for name, value in fields.items() if value is not None}
    for shape in SHAPES:
        if present.issuperset(shape.fields):
            return shape
    wanted = ", ".join(" + ".join(shape.fields) for shape in SHAPES)
    raise UserError(f"no conversation: looked for {wanted}; the row has {names_of(fields)}")


def instruction_of(fields: Fields) -> list[Message]:
    """The question of an Alpaca row: the turns of `history`, [question, answer] each, then instruction and input."""
    question = check_text(fields["instruction"], "instruction")
    if fields.get("input"):
        question += "\n\n" + check_text(fields["input"], "input")
    return [*_history(fields.get("history") or []), Message(role="user", content=question)]


def _history(pairs: object) -> Iterator[Message]:
    if not isinstance(pairs, list):
        raise UserError(f"history must be a list of [question, answer], got {type_name(pairs)}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"history[{index}] must be [question, answer], got {type_name(pair)}; drop the row")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield as_message(role, text, f"history[{index}]")


def as_message(role: str, value: object, field: str) -> Message:
    """A message of one string."""
    return Message(role=role, content=check_text(value, field))


def as_messages(role: str, value: object, field: str) -> list[Message]:
    """A message list as it is, or a string as one message of the role."""
    return parse_messages(value, field) if isinstance(value, list) else [as_message(role, value, field)]


def parse_messages(value: object, field: str) -> list[Message]:
    """A list of {"role", "content"} or {"from", "value"} as messages. Raises UserError that names the message."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{field} must be a list of messages, got {type_name(value) if value else 'an empty list'}")
    return [_parse_message(entry, f"{field}[{index}]") for index, entry in enumerate(value)]


def _keys_of(entry: Mapping[str, object]) -> tuple[str, str]:
    """Where a message has its role and its content."""
    return ("from", "value") if entry.get("from") is not None else ("role", "content")


def _parse_message(entry: object, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must be an object with role and content, got {type_name(entry)}")
    role_key, content_key = _keys_of(entry)
    given = entry.get(role_key)
    if not isinstance(given, str) or given not in _ROLES:
        raise UserError(f"{where}.{role_key} must be one of {', '.join(_ROLES)}, got {given!r}")
    try:
        check_fields(entry)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
    role, calls, content = _ROLES[given], entry.get("tool_calls"), entry.get(content_key)
    if content or not calls:
        message = as_message(role, content, f"{where}.{content_key}")
    else:
        message = Message(role=role, content="")
    if calls:
        message["tool_calls"] = _checked_calls(calls, f"{where}.tool_calls")
    for key in ("name", "tool_call_id"):
        if entry.get(key) is not None:
            message[key] = check_characters(entry[key], f"{where}.{key}")
    reasoning = next((key for key in _REASONING if entry.get(key) is not None), None)
    if reasoning is not None:
        message["reasoning_content"] = check_characters(entry[reasoning], f"{where}.{reasoning}")
        if role != "assistant":
            raise UserError(f"{where}.{reasoning} stands in a message of {role}; only an assistant's is written")
    if not _is_trained(entry, role, where):
        message["train"] = False
    return message


def _is_trained(entry: Mapping[str, object], role: str, where: str) -> bool:
    """Whether a message may carry loss, by the flag that it has, if any."""
    for flag in _FLAGS:
        value = entry.get(flag)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(
                f"{where}.{flag} must be 0 or 1 (false or true): an answer is trained or not, got {value!r}; "
                "use data.train=[{path: ..., weight: ...}] for shares"
            )
        if not value:
            return False
        if role != "assistant" and flag != "weight":
            raise UserError(f"{where}.{flag} is true, but only answers are trained, got role {role}; drop the flag")
    return True


def _checked_calls(calls: object, where: str) -> list[object]:
    if not isinstance(calls, list):
        raise UserError(f"{where} must be a list of objects, got {type_name(calls)}")
    parsed = [_json_object(call) or call for call in calls]
    if not all(isinstance(call, Mapping) for call in parsed):
        raise UserError(f"{where} must be a list of objects, got {type_name(calls)}")
    return parsed


def _json_object(value: object) -> Mapping[str, object] | None:
    """The object whose JSON a string is, None for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    except RecursionError:
        raise UserError(f"an object in a string is nested more than {MAX_DEPTH} levels deep; drop the row") from None
    check_depth(parsed, "an object in a string")
    return parsed if isinstance(parsed, Mapping) else None


def with_parsed_arguments(calls: Sequence[object]) -> list[object]:
    """Tool calls with objects for arguments that are the JSON of one, OpenAI's form: `tojson` would encode it again."""
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(call, Mapping) and isinstance(function, Mapping):
            arguments = _json_object(function.get("arguments"))
            if arguments is not None:
                call = {**call, "function": {**function, "arguments": arguments}}
        elif isinstance(call, Mapping) and (arguments := _json_object(call.get("arguments"))) is not None:
            call = {**call, "arguments": arguments}
        parsed.append(call)
    return parsed


def with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages with the row's system message, if it has one, in front."""
    given = [name for name in ("system", "system_prompt") if fields.get(name)]
    if len(given) > 1:
        raise UserError("the row has both system and system_prompt; drop one of them")
    return [*(as_message("system", fields[name], name) for name in given), *messages]


def check_order(messages: Sequence[Message]) -> None:
    """Raises UserError unless user and assistant take turns, user first, after at most one system message.

    Between two messages of the assistant, tools may answer the first.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise UserError("a system message must be the first and the only one; merge or drop the others")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for number, (before, role) in enumerate(zip(["", *turns], turns, strict=False), start=1):
        if role not in _FOLLOWS[before]:
            raise UserError(f"user and assistant must take turns, user first; turn {number} is {role}; drop the row")


def check_text(value: object, field: str) -> str:
    """The value if it is text that a model can learn. Raises UserError that names the field."""
    text = check_characters(value, field)
    if not text.strip():
        raise UserError(f"{field} is empty; drop the row")
    return text


def check_characters(value: object, field: str) -> str:
    """The value if it is a string of characters. Raises UserError that names the field."""
    if not isinstance(value, str):
        raise UserError(f"{field} must be a string, got {type_name(value)}")
    return checked_characters(value, field)


def names_of(fields: Fields) -> str:
    """The names of a row's fields, for messages."""
    return ", ".join(fields) or "no fields"


def text_of(row: Row) -> str:
    """The document of a row: its field "text". It may be empty, as in data sets that mark gaps by empty rows.

    Raises:
        UserError: no such field, no string, NUL bytes or lone surrogates.
    """
    with located(row):
        if "text" not in row.fields:
            raise UserError(f'no field "text"; the row has {names_of(row.fields)}')
        return check_characters(row.fields["text"], "text")
