"""JSON files are checked once, against what is read of them."""

from pathlib import Path
from typing import TypedDict

import pytest

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import MAX_DEPTH, parsed_json, read_json


class _Schema(TypedDict, total=False):
    size: int
    ids: int | list[int] | None
    names: list[dict[str, str]]


def _nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    return '{"a": ' + opening * (levels - 1) + closing * (levels - 1) + "}"


@pytest.mark.parametrize("text", ['{"size": 3, "ids": [1, 2], "other": [{"a": null}]}', '{"ids": null}', "{}"])
def test_an_object_is_returned_whole(text: str) -> None:
    content = parsed_json(text, "f.json", _Schema)
    assert set(content) == set(parsed_json(text, "f.json"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"size": "3"}', "f.json: size: must be an integer, got a string; mend the file"),
        ('{"size": true}', "f.json: size: must be an integer, got true or false"),
        ('{"size": 2.5}', "f.json: size: must be an integer, got a number"),
        ('{"ids": [1, "x"]}', "f.json: ids[1]: must be an integer, got a string"),
        ('{"ids": {"a": 1}}', "f.json: ids: must be an integer or a list or null, got an object"),
        ('{"names": [{"a": 1}]}', "must be a string, got an integer"),
        ("[1, 2]", "f.json: must hold a JSON object, got list"),
        ('"text"', "f.json: must hold a JSON object, got str"),
        ('{"size": 3', "f.json: must be JSON"),
        ("1" * 5000, "f.json: must be JSON"),
    ],
)
def test_what_has_another_type_is_named(text: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        parsed_json(text, "f.json", _Schema)
    assert problem in str(error.value)


def test_half_a_surrogate_pair_is_no_text_where_it_is_read() -> None:
    assert parsed_json('{"other": "\\ud800"}', "f.json", _Schema)
    with pytest.raises(UserError, match=r"f.json: no text may hold half of a surrogate pair, got '\\ud800'"):
        parsed_json('{"names": [{"a": "x\\ud800"}]}', "f.json", _Schema)
    with pytest.raises(UserError, match="no text may hold half of a surrogate pair"):
        parsed_json('{"size": "\\ud800"}', "f.json", _Schema)  # where a text is none of the types


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 900, 100_000])
def test_deep_nesting_is_refused(levels: int) -> None:
    for brackets in ("[]", "{}"):
        opening = '{"b": ' if brackets == "{}" else "["
        text = _nested(levels, opening, brackets[1]).replace('{"b": }', "{}")
        with pytest.raises(UserError, match=f"f.json: is nested more than {MAX_DEPTH} levels deep"):
            parsed_json(text, "f.json")


def test_what_is_as_deep_as_allowed_is_read() -> None:
    assert parsed_json(_nested(MAX_DEPTH), "f.json")


def test_a_file_names_itself(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{file}: cannot be read: No such file"):
        read_json(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=f"{file}: must be UTF-8"):
        read_json(file)
