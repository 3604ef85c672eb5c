"""Rows of files, one at a time, and the texts and conversations that they hold.

    file | glob | folder | hub id  ->  files in sorted order  ->  Row(file, number, fields)  ->  text | messages

What cannot be read, or is none of the known shapes, raises a UserError that names the file and the row.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from bitnet_train.data.hub import is_hub_id, read_hub
from bitnet_train.data.readers import (
    FORMATS,
    START,
    Fields,
    Place,
    format_of,
    is_readable,
    read_file,
    read_from,
    type_name,
)
from bitnet_train.errors import UserError

_METADATA = {"dataset_dict.json", "dataset_info.json", "state.json"}  # what `datasets` writes beside its .arrow files
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},  # ShareGPT
}
_FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Message(TypedDict):
    """One turn of a conversation; role is system, user, assistant or tool. A message with tool_calls may be empty."""

    role: str
    content: str
    tool_calls: NotRequired[list[object]]  # of an assistant, as transformers' templates know them
    name: NotRequired[str]  # of a tool's answer
    tool_call_id: NotRequired[str]  # likewise


@dataclass(frozen=True)
class Row:
    """One row of a file; `number` counts lines or rows from 1."""

    file: str
    number: int
    fields: Fields

    @property
    def where(self) -> str:
        """file:number, as messages name it."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class BadRow:
    """A row that is no row; `error` says why, the file and the number included."""

    error: UserError


@contextmanager
def located(row: Row) -> Iterator[None]:
    """Puts the file and the number of the row in front of a UserError from the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def read_rows(paths: str | Sequence[str]) -> Iterator[Row]:
    """Streams the rows of all files that the paths name, in the order of `expand`; `readers` lists the formats.

    Raises:
        UserError: what `expand` raises, at once; while reading, what `scan_rows` raises and the error of a bad row.
    """
    return map(_good, scan_rows(expand(paths)))


def _good(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise row.error
    return row


def scan_rows(files: Sequence[str], on_read: Callable[[int], object] = int) -> Iterator[Row | BadRow]:
    """Streams the rows of files and hub ids, bad ones included.

    Args:
        on_read: is told how many bytes of a file were read, each time.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    return (row for file in files for row in _rows_of(file, on_read))


def _rows_of(file: str, on_read: Callable[[int], object]) -> Iterator[Row | BadRow]:
    empty = True
    for number, content in read_hub(file) if is_hub_id(file) else read_file(file, on_read):
        empty = False
        yield row_of(file, number, content)
    if empty:
        raise no_rows(file)


def characters_of(value: object) -> int:
    """Characters of a row or of a value in it; what is no text counts for eight."""
    if isinstance(value, Row):
        return characters_of(value.fields)
    if isinstance(value, dict):
        return sum(map(characters_of, value.values()))
    if isinstance(value, list):
        return sum(map(characters_of, value))
    return len(value) if isinstance(value, str) else 8


class Block(NamedTuple):
    """Consecutive rows of a file; reading it again begins at `start`, reading on at `end`."""

    start: Place
    end: Place
    rows: list[Row | BadRow]


def read_blocks(file: str, start: Place, characters: int, on_read: Callable[[int], object] = int) -> Iterator[Block]:
    """Streams a file from a place on in blocks of whole rows, each of at least so many characters but for the last.

    From the start of any block on the blocks are the same.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    rows: list[Row | BadRow] = []
    size, first, end = 0, start, start
    for end, content in read_from(file, start, on_read):
        rows.append(row_of(file, end.number, content))
        size += characters_of(content)
        if size >= characters:
            yield Block(first, end, rows)
            rows, size, first = [], 0, end
    if rows:
        yield Block(first, end, rows)
    elif end == START:
        raise no_rows(file)


def row_of(file: str, number: int, content: Fields | UserError) -> Row | BadRow:
    """A row as `readers` gives it."""
    if isinstance(content, UserError):
        return BadRow(UserError(f"{file}:{number}: {content}"))
    return Row(file, number, content)


def no_rows(file: str) -> UserError:
    """What is said of a file without rows."""
    return UserError(f"{file}: the file holds no rows; fill it or take it out of the data paths")


def expand(paths: str | Sequence[str]) -> list[str]:
    """The files and hub ids that paths, globs and folders name, sorted and once each: the same on every machine.

    A folder stands for the files of known formats in it, at any depth, hidden ones left out. A name that is no local
    path but reads like owner/name[:config][@split] is a data set of the Hugging Face hub (split: train).

    Raises:
        UserError: a path or a glob that matches nothing, a file of an unknown format.
    """
    names = [paths] if isinstance(paths, str) else paths
    files = sorted({file for name in names for file in _expand_one(str(name))})
    if not files:
        raise UserError("no data path was given; name a file, a glob, a folder or a hub id")
    return files


def _expand_one(name: str) -> list[str]:
    path = Path(name)
    if path.is_file():
        format_of(name)
        return [name]
    if is_hub_id(name):
        return [name]
    if path.is_dir():
        files = [str(file) for file in path.rglob("*") if _is_data(file, path)]
        missing = f"the folder holds no file of {FORMATS}"
    else:
        files = [file for match in glob.glob(name, recursive=True) for file in _expand_one(match)]
        missing = "no such file or folder, and as a glob it matches nothing"
    if not files:
        raise UserError(f"{name}: {missing}; check the path (a hub id is owner/name)")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return is_readable(file.name) and not hidden and file.name not in _METADATA and file.is_file()


def text_of(row: Row) -> str:
    """The document of a row: its field "text". It may be empty, as in data sets that mark gaps by empty rows.

    Raises:
        UserError: no such field, no string, NUL bytes or lone surrogates.
    """
    with located(row):
        if "text" not in row.fields:
            raise UserError(f'no field "text"; the row has {_names(row.fields)}')
        return _check_characters(row.fields["text"], "text")


def messages_of(row: Row) -> list[Message]:
    """The conversation of a row, in any of the shapes that people have:

        {"messages": [{"role", "content"}]}      {"conversations": [{"from", "value"}]} (ShareGPT)
        {"instruction", "input", "output"}       {"prompt", "completion"}, strings or message lists

    A field "system" beside any of them comes first. Roles: system, user (human), assistant (gpt, function_call), tool
    (observation).

    Raises:
        UserError: no known shape; empty, null or non-text content; an unknown role; a system message that is not first;
            turns out of order; no assistant message; NUL bytes or lone surrogates.
    """
    with located(row):
        messages = with_system(row.fields, _conversation(row.fields))
        check_order(messages)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError("the conversation has no assistant message, so there is nothing to learn; drop the row")
        return messages


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
            except ValueError as error:
                raise UserError(f"tools is no JSON ({error}); write a list of functions") from None
        if value is not None and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
            raise UserError(f"tools must be a list of objects, or the JSON of one, got {type_name(value)}")
        return value or None


def _conversation(fields: Fields) -> list[Message]:
    """The first shape whose fields are there and not null."""
    present = {name for name, value in fields.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in present:
            return parse_messages(fields[name], name)
    if {"instruction", "output"} <= present:
        question = check_text(fields["instruction"], "instruction")
        if fields.get("input"):
            question += "\n\n" + check_text(fields["input"], "input")
        return [Message(role="user", content=question), as_message("assistant", fields["output"], "output")]
    if {"prompt", "completion"} <= present:
        return as_messages("user", fields["prompt"], "prompt") + as_messages(
            "assistant", fields["completion"], "completion"
        )
    raise UserError(
        "no conversation: looked for messages, conversations, instruction + output and prompt + completion; "
        f"the row has {_names(fields)}"
    )


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


def _parse_message(entry: object, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must be an object with role and content, got {type_name(entry)}")
    role_key, content_key = ("from", "value") if "from" in entry else ("role", "content")
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}.{role_key} must be one of {', '.join(_ROLES)}, got {role!r}")
    calls = entry.get("tool_calls")
    content = entry.get(content_key)
    message = as_message(_ROLES[role], content, f"{where}.{content_key}") if content or not calls else _silent(role)
    if calls:
        message["tool_calls"] = _checked_calls(calls, f"{where}.tool_calls")
    for key in ("name", "tool_call_id"):
        if entry.get(key) is not None:
            message[key] = _check_characters(entry[key], f"{where}.{key}")
    return message


def _silent(role: str) -> Message:
    return Message(role=_ROLES[role], content="")


def _checked_calls(calls: object, where: str) -> list[object]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where} must be a list of objects, got {type_name(calls)}")
    return calls


def with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages with the row's field "system", if it has one, in front."""
    system = fields.get("system")
    return [as_message("system", system, "system"), *messages] if system else messages


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
    text = _check_characters(value, field)
    if not text.strip():
        raise UserError(f"{field} is empty; drop the row")
    return text


def _check_characters(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{field} must be a string, got {type_name(value)}")
    if "\0" in value or _SURROGATE.search(value):
        raise UserError(f"{field} holds NUL bytes or lone surrogates, which are no text; clean or drop the row")
    return value


def _names(fields: Fields) -> str:
    return ", ".join(fields) or "no fields"
