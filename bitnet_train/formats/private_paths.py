r"""Files that leave the machine name no folder of it: of an absolute path the last part stays.

    /home/alice/client/rows.jsonl   ->  rows.jsonl            also ~/..., C:\..., \\server\..., file:///...
    https://host/a/b, org/model     ->  as they are

A file name, or an id of the hub, is what a reader can use; the folders tell of people, clients and machines.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_END = r"""[^\s"'`<>|,;:=()\[\]{}\\/]"""  # of a part of a path in a text
_ROOT = r"(?:file://+|(?<!:)//|~?/(?!/)|\b[A-Za-z]:[\\/]|\\\\)"
# not within a word, a URL (the slash after its colon, or after its host), or a relative path
_IN_TEXT = re.compile(rf"(?<![\w/.\\~<\])-]){_ROOT}(?:{_END}+[\\/])+{_END}*")
_WHOLE = re.compile(rf"{_ROOT}.+", re.DOTALL)
_KEPT = ("_tokens", "chat_template", "template", "content")  # texts, and tokens such as "/"


def without_path(value: str) -> str:
    """The last part of a value that is an absolute path; any other value as it is."""
    if not _WHOLE.fullmatch(value) or "\n" in value:
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1]


def without_paths(value: T, key: str = "") -> T:
    """A JSON value with `without_path` of every string in it, at any depth, but for tokens and templates."""
    if isinstance(value, str) and not key.endswith(("_token", *_KEPT)):
        return text_without_paths(without_path(value))  # type: ignore[return-value]
    if isinstance(value, Mapping):
        entries = {without_path(name): without_paths(entry, name) for name, entry in value.items()}
        return entries  # type: ignore[return-value]
    if isinstance(value, list):
        return [without_paths(entry, key) for entry in value]  # type: ignore[return-value]
    return value


def text_without_paths(text: str) -> str:
    """A text for people with the last part of every absolute path in it that has folders."""
    return _IN_TEXT.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    """The last part, and the full stop of a sentence that ends with it."""
    kept = path.rstrip("\\/.")
    return re.split(r"[\\/]", kept)[-1] + path[len(kept) :].replace("/", "").replace("\\", "")
