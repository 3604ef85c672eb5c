"""Rows that are nested so deep that recursive functions would fail are bad rows."""

import json
from pathlib import Path

import pytest

from bitnet_train.data.conversation import messages_of, tools_of
from bitnet_train.data.sources import BadRow, Row, scan_rows
from bitnet_train.errors import UserError


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("field", ['"tools": [{"a": %s}]', '"messages": [{"tool_calls": [{"a": %s}]}]', '"x": %s'])
@pytest.mark.parametrize("depth", [110, 900, 100_000])
def test_a_row_that_is_nested_too_deep_is_a_bad_row(tmp_path: Path, field: str, depth: int) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("{" + field % nested(depth) + '}\n{"text": "good"}\n')
    bad, good = scan_rows([str(file)])
    assert isinstance(bad, BadRow)
    assert str(bad.error).startswith(f"{file}:1: ")
    assert isinstance(good, Row)


@pytest.mark.parametrize("depth", [110, 900, 100_000])
def test_json_in_a_string_that_is_nested_too_deep_is_an_error(depth: int) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [f'{{"a": {nested(depth)}}}']}
    fields: dict[str, object] = {
        "tools": f'[{{"a": {nested(depth)}}}]',
        "messages": [{"role": "user", "content": "a"}, call],
    }
    for read in (tools_of, messages_of):
        with pytest.raises(UserError, match=r"x:1: .*(nested more than 100|no JSON)"):
            read(Row("x", 1, fields))


def test_a_row_of_usual_depth_with_many_brackets_is_read(tmp_path: Path) -> None:
    fields = {"text": "[" * 1000, "tools": [{"a": json.loads(nested(90))}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(fields) + "\n")
    (row,) = scan_rows([str(tmp_path / "x.jsonl")])
    assert isinstance(row, Row)
    assert row.fields == fields
