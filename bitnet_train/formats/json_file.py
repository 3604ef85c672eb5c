"""JSON files, which somebody else may have written: each is checked, once, against what is read of it.

    read_json(path, Schema)    Schema: a TypedDict (total=False) of the fields that are read, and their types

What a schema does not name may be anything. What is no UTF-8, no JSON, nested deeper than `MAX_DEPTH` or of another
type is one line that names the file and the field.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any, is_typeddict

import msgspec

from bitnet_train.errors import UserError

MAX_DEPTH = 100  # levels: what is read recursively must not end in a RecursionError; real files have ten
_CONTAINERS = frozenset((dict, list))
_TYPE_NAMES = {  # by the names of JSON Schema, which msgspec writes, and of Python
    **dict.fromkeys(("object", "dict"), "an object"),
    **dict.fromkeys(("array", "list"), "a list"),
    "NoneType": "null",
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
}


def read_json(path: Path, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        schema: what is read of it, as msgspec knows types; other fields are kept.

    Raises:
        UserError: the file is missing, is no JSON object, or a field has another type than the schema says.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parsed_json(text, str(path), schema)


def parsed_json(text: bytes | str, where: str, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON text; `where` names it in messages. Raises as `read_json` does."""
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: must be UTF-8: {error}; write it again") from None
    except ValueError as error:
        raise UserError(f"{where}: must be JSON: {error}; write it again") from None
    except RecursionError:
        raise _too_deep(where) from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: must hold a JSON object, got {type(content).__name__}; write it again")
    if is_deep(content):
        raise _too_deep(where)
    check(content, where, schema)
    if is_typeddict(schema):
        _check_texts(msgspec.convert(content, schema), where)
    return content


def is_deep(value: object) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` levels deep."""
    level = _containers([value])
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = _containers(list(chain.from_iterable(p.values() if isinstance(p, dict) else p for p in level)))
    return bool(level)


def _containers(values: Sequence[object]) -> list[Any]:
    """The lists and objects among the values; half a million merges are looked at in milliseconds."""
    return list(compress(values, map(_CONTAINERS.__contains__, map(type, values))))


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: is nested more than {MAX_DEPTH} levels deep; write it again")


def check(content: Mapping[str, Any], where: str, schema: Any, remedy: str = "mend the file") -> None:
    """Compares the fields of an object with a schema.

    Raises:
        UserError: a field has another type, the message names it as `a.b[0]`.
    """
    try:
        msgspec.convert(content, schema)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        field = place.strip("`").removeprefix("$").removeprefix(".") or "the file"
        raise UserError(f"{where}: {field}: {_in_words(problem)}; {remedy}") from None
    except UnicodeEncodeError as error:
        raise _half_a_pair(where, error) from None


def _half_a_pair(where: str, error: UnicodeEncodeError) -> UserError:
    bad = error.object[error.start]
    return UserError(f"{where}: no text may hold half of a surrogate pair, got {bad!r}; mend the file")


def _check_texts(read: object, where: str) -> None:
    """Refuses texts that cannot be written, among what is read: little beside a vocabulary."""
    try:
        msgspec.json.encode(read)
    except UnicodeEncodeError as error:
        raise _half_a_pair(where, error) from None


def _in_words(problem: str) -> str:
    """msgspec's message: Expected `int | null`, got `str`."""
    problem = problem.replace("Expected ", "must be ", 1).replace("Object missing required field", "must have", 1)
    wanted, _, got = problem.partition(", got ")
    spelled = re.sub(r"`([^`]*)`", lambda found: _named(found[1]), wanted)
    return f"{spelled}, got {_named(got.strip('`'))}" if got else spelled


def _named(types: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in types.split(" | "))


def type_name(value: object) -> str:
    """The type of a JSON value in words, for messages."""
    return _named(type(value).__name__)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON file with an indent of two, as transformers does; half a surrogate pair stays an escape."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except UnicodeEncodeError:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
