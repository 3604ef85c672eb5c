"""Parquet and Arrow as `datasets` writes them today: objects of mixed shape, and nulls that no row had."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pytest
from pyarrow import parquet

from bitnet_train.data.conversation import messages_of, tools_of
from bitnet_train.data.sources import read_rows
from bitnet_train.errors import UserError
from tests.support import write_jsonl

ASKED = {"role": "user", "content": "weather in Oslo?"}


def tool(name: str, **properties: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def called(name: str, **arguments: object) -> dict[str, object]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


WEATHER, CALC = tool("weather", city={"type": "string"}), tool("calc", expr={"type": "string"})
ROWS: list[dict[str, Any]] = [
    {"messages": [ASKED, called("weather", city="Oslo")], "tools": [WEATHER, CALC]},
    {"messages": [{"role": "user", "content": "3*4?"}, called("calc", expr="3*4")], "tools": [CALC]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": None},
]


def to_parquet(rows: datasets.Dataset, folder: Path) -> Path:
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def to_folder(rows: datasets.Dataset, folder: Path) -> Path:
    rows.save_to_disk(folder / "saved")
    return folder / "saved"


def to_arrow(rows: datasets.Dataset, folder: Path) -> Path:
    rows.save_to_disk(folder / "saved")
    (file,) = (folder / "saved").glob("data-*.arrow")
    return file.rename(folder / "rows.arrow")


def loaded(rows: list[dict[str, Any]], folder: Path) -> datasets.Dataset:
    """As datasets reads the rows from a file of lines: columns of mixed objects have the type Json."""
    file = write_jsonl(folder / "rows.jsonl", rows)
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    assert isinstance(data, datasets.Dataset)
    return data


@pytest.mark.parametrize("save", [to_parquet, to_folder, to_arrow])
def test_what_datasets_saved_is_what_was_written(
    tmp_path: Path, save: Callable[[datasets.Dataset, Path], Path]
) -> None:
    data = loaded(ROWS, tmp_path)
    assert "Json" in str(data.features)  # so that the test is one
    found = list(read_rows(str(save(data, tmp_path))))
    assert [messages_of(row) for row in found] == [row["messages"] for row in ROWS]
    assert [tools_of(row) for row in found] == [row["tools"] for row in ROWS]


@pytest.mark.parametrize("save", [to_parquet, to_folder, to_arrow])
def test_nulls_of_a_union_of_structs_are_taken_out(
    tmp_path: Path, save: Callable[[datasets.Dataset, Path], Path]
) -> None:
    """Dataset.from_list gives every tool the parameters of all tools."""
    data = datasets.Dataset.from_list(ROWS)
    assert "expr" in data[0]["tools"][0]["function"]["parameters"]["properties"]
    found = list(read_rows(str(save(data, tmp_path))))
    assert [tools_of(row) for row in found] == [row["tools"] for row in ROWS]
    assert [messages_of(row) for row in found] == [row["messages"] for row in ROWS]


def test_an_object_of_a_json_column_keeps_its_nulls(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, called("f", x=None, y=[1])]}, {"messages": [ASKED, called("g", z={"a": None})]}]
    (first, second) = read_rows(str(to_parquet(loaded(rows, tmp_path), tmp_path)))
    assert [messages_of(row) for row in (first, second)] == [row["messages"] for row in rows]


def test_hub_rows_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (loaded(ROWS, tmp_path), datasets.Dataset.from_list(ROWS)):
        streamed = data.to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=streamed, **__: rows)
        found = list(read_rows("owner/name"))
        assert [row.number for row in found] == [1, 2, 3]
        assert [tools_of(row) for row in found] == [row["tools"] for row in ROWS]
        assert [messages_of(row) for row in found] == [row["messages"] for row in ROWS]


def test_json_that_is_none_is_the_rows_error(tmp_path: Path) -> None:
    values = pyarrow.array(['{"a": 1}', "{broken", None], pyarrow.json_(pyarrow.string()))
    parquet.write_table(pyarrow.table({"x": values}), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert next(rows).fields == {"x": {"a": 1}}
    with pytest.raises(UserError, match=r"a.parquet:2: a value of type arrow.json is no JSON"):
        next(rows)


@pytest.mark.parametrize(
    "wrap", [pyarrow.list_, pyarrow.large_list, pyarrow.list_view, lambda kind: pyarrow.list_(kind, 1)]
)
def test_structs_in_lists_of_every_kind_lose_their_nulls(tmp_path: Path, wrap: Callable[..., Any]) -> None:
    kind = wrap(pyarrow.struct([("a", pyarrow.int64()), ("b", pyarrow.int64())]))
    table = pyarrow.table({"x": pyarrow.array([[{"a": 1}], [{"b": 2}], None], kind)})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [row.fields for row in read_rows(str(tmp_path / "a.arrow"))] == [
        {"x": [{"a": 1}]},
        {"x": [{"b": 2}]},
        {"x": None},
    ]


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    parquet.write_table(pyarrow.table({"x": pyarrow.array([[("city", "Oslo")], None], kind)}), tmp_path / "a.parquet")
    assert [row.fields["x"] for row in read_rows(str(tmp_path / "a.parquet"))] == [{"city": "Oslo"}, None]


def test_strings_that_look_like_json_stay_strings(tmp_path: Path) -> None:
    text = json.dumps({"a": 1})
    data = datasets.Dataset.from_list([{"text": text, "nested": {"text": text}}])
    (found,) = read_rows(str(to_parquet(data, tmp_path)))
    assert found.fields == {"text": text, "nested": {"text": text}}
