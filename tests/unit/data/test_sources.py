"""Paths to rows in every format and compression, and rows to texts and conversations."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from bitnet_train.data.conversation import Message, messages_of, text_of, tools_of
from bitnet_train.data.paths import expand
from bitnet_train.data.readers import START, read_from
from bitnet_train.data.sources import Row, read_rows
from bitnet_train.errors import UserError

ROWS: list[dict[str, object]] = [{"text": "one"}, {"text": "zwei, größer"}, {"text": "three\u2028lines"}]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write_table(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif path.stem == "feather":
        feather.write_feather(table, str(path))
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def fields(rows: Iterator[Row]) -> list[dict[str, object]]:
    return [row.fields for row in rows]


def row(**of: object) -> Row:
    return Row("rows.jsonl", 7, of)


def said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


# ---- formats ----


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSIONS[compression](JSON_LINES))
    assert fields(read_rows(str(path))) == ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "stream.arrow", "feather.arrow"])
def test_reading_goes_on_at_any_place(tmp_path: Path, name: str, compression: str) -> None:
    if name.endswith((".jsonl", ".txt")):
        (tmp_path / name).write_bytes(JSON_LINES.replace(b"\n", b"\n\n \n") + b"{broken")
    else:
        write_table(tmp_path / name)
    path = tmp_path / ("x-" + name + compression)
    path.write_bytes(COMPRESSIONS[compression]((tmp_path / name).read_bytes()))
    whole = [(place, str(content)) for place, content in read_from(str(path), START)]
    assert len(whole) == (1 if name == "a.txt" else 4 if name == "a.jsonl" else 3)
    for rest, (place, _) in enumerate(whole, start=1):
        assert [(place, str(content)) for place, content in read_from(str(path), place)] == whole[rest:]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "feather.arrow"])
def test_tables(tmp_path: Path, name: str, compression: str) -> None:
    write_table(tmp_path / name)
    path = tmp_path / ("x-" + name + compression)
    path.write_bytes(COMPRESSIONS[compression]((tmp_path / name).read_bytes()))
    rows = list(read_rows(str(path)))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"line one\r\nline two\n"))
    assert fields(read_rows(str(path))) == [{"text": "line one\r\nline two\n"}]


def test_numbers_count_lines_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    rows = list(read_rows(str(path)))
    assert [(row.number, row.fields) for row in rows] == [(1, {"text": "a"}), (4, {"text": "b"})]
    assert rows[1].where == f"{path}:4"


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\nbroken\n')
    rows = read_rows(str(path))
    assert next(rows).fields == {"text": "fine"}
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is no JSON"):
        next(rows)


# ---- paths ----


def test_expand_is_sorted_and_without_repetition(tmp_path: Path) -> None:
    found = [
        "a.txt",
        "b.jsonl",
        "c.json.xz",
        "d/a.arrow",
        "d/b/c.parquet",
        *(f"e{number}.jsonl" for number in range(9)),
    ]
    for name in [*found[::-1], "README.md", ".hidden.jsonl", ".cache/d.jsonl", "state.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths = [str(tmp_path / name) for name in found]
    assert expand(str(tmp_path)) == paths
    assert expand([paths[3], str(tmp_path / "*.jsonl"), str(tmp_path), paths[0]]) == paths
    assert expand(str(tmp_path / "**" / "*.parquet")) == paths[4:5]


@pytest.mark.parametrize("name", ["missing.jsonl", "*.jsonl", "a/missing.parquet", "empty", "missing"])
def test_what_matches_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="check the path"):
        read_rows(str(tmp_path / name))


def test_no_path_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="no data path"):
        read_rows([])


def test_an_unknown_format_is_an_error_even_in_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.csv\.gz: unknown format '\.csv'; \.txt \.jsonl"):
        expand(str(tmp_path / "*"))


def test_hub_ids_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked = {"name": name, "config": config, "split": split, "streaming": streaming}
        return datasets.Dataset.from_list([asked]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (plain,) = read_rows("owner/name")
    assert plain.fields == {"name": "owner/name", "config": None, "split": "train", "streaming": True}
    (full,) = read_rows("owner/name-1.0:small@test_sft")
    assert full.fields == {"name": "owner/name-1.0", "config": "small", "split": "test_sft", "streaming": True}
    assert full.where == "owner/name-1.0:small@test_sft:1"


def test_a_hub_that_has_no_such_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise FileNotFoundError("no dataset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^data/train: no such local path.*no dataset"):
        list(read_rows("data/train"))


def test_a_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(datasets, "load_dataset")
    assert fields(read_rows("owner/name")) == [{"text": "here"}]


def test_a_file_name_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data/train\.jsonl: no such file or folder"):
        read_rows("data/train.jsonl")


# ---- damaged files ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"text": "a"}\n{"text": }\n', r"a\.jsonl:2: the line is no JSON .*one object per line"),
        (b'[\n{"text": "a"}\n]', r"a\.jsonl:1: .*jq -c"),
        (b'["a"]\n', r"a\.jsonl:1: the line is a list"),
        (b"null\n", r"a\.jsonl:1: the line is null"),
        (b"[" * 100_000 + b"\n", r"a\.jsonl:1: the line is no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: the line is no JSON"),
        (b'{"text": "a"}\n{"text": "\xe4"}\n', r"a\.jsonl:2: byte 0xe4 at 10 is not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: the byte order mark says UTF-16"),
    ],
)
def test_bad_json_lines(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("data", "message"), [(b" \n", "holds no rows"), (b"\xff\xfea\0", "UTF-16"), (b"\xff", "UTF-8")]
)
def test_bad_text_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.parquet.gz"])
@pytest.mark.parametrize("data", [b"not what the name says", b""])
def test_damaged_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"a\.\w+(\.\w+)?: (cannot be read|the file holds no rows)"):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_truncated_download_is_an_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESSIONS[compression](JSON_LINES)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(str(path)))


# ---- texts ----


def test_text_of() -> None:
    assert text_of(row(text=" as it is\n", id=3)) == " as it is\n"
    assert text_of(row(text="")) == ""


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"content": "a", "id": 1}, r'^rows\.jsonl:7: no field "text"; the row has content, id$'),
        ({"text": None}, r"^rows\.jsonl:7: text must be a string, got null"),
        ({"text": ["a"]}, "got a list"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": "a\ud800b"}, "lone surrogates"),
    ],
)
def test_bad_texts(bad: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_of(row(**bad))


# ---- conversations ----

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "shape",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None}], "conversations": None},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": 1},
        {"conversations": [USER, ASSISTANT]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_shapes_of_conversations(shape: dict[str, object]) -> None:
    assert said(messages_of(row(**shape))) == [("user", "Q"), ("assistant", "A")]
    with_system = said(messages_of(row(**shape, system="S")))
    assert with_system == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_the_input_of_alpaca_follows_the_instruction() -> None:
    assert messages_of(row(instruction="Q", input="I", output="A"))[0]["content"] == "Q\n\nI"


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_tools_may_answer_between_two_messages_of_the_assistant() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    answer = {"role": "tool", "content": "2", "name": "f"}
    messages = messages_of(row(messages=[USER, call, answer, answer, ASSISTANT, USER, ASSISTANT]))
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}
    assert messages[2] == messages[3] == answer
    turns = [("human", "Q"), ("function_call", "f(1)"), ("observation", "2"), ("gpt", "A")]
    sharegpt = messages_of(row(conversations=[{"from": role, "value": text} for role, text in turns]))
    assert [message["role"] for message in sharegpt] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_a_list_or_the_json_of_one(given: object) -> None:
    assert tools_of(row(tools=given)) == TOOLS


@pytest.mark.parametrize("given", [None, [], "", "[]"])
def test_no_tools(given: object) -> None:
    assert tools_of(row(tools=given)) is None
    assert tools_of(row()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[", r"^rows\.jsonl:7: tools is no JSON"),
        ({"name": "f"}, r"^rows\.jsonl:7: tools must be a list of objects, .*got an object"),
        ('"f"', "got a string"),
        (["f"], "tools must be a list of objects"),
    ],
)
def test_bad_tools(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tools_of(row(tools=given))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"text": "a", "id": 1}, r"^rows\.jsonl:7: no conversation: looked for .*the row has text, id$"),
        ({}, "no fields"),
        ({"messages": []}, "messages must be a list of messages, got an empty list"),
        ({"messages": "hi"}, "messages must be a list of messages, got a string"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]\.content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"content must be a string, got null"),
        ({"messages": [USER, {"role": "assistant"}]}, r"content must be a string, got null"),
        ({"messages": [USER, {"role": "assistant", "content": [{"text": "A"}]}]}, "must be a string, got a list"),
        ({"messages": [USER, {"role": "bot", "content": "A"}]}, r"messages\[1\]\.role must be one of .*, got 'bot'"),
        ({"messages": [USER, {"role": "tool", "content": "A"}]}, r"take turns, user first; turn 2 is tool"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "f()"}]}, r"\[1\]\.tool_calls must be a list of obj"),
        ({"messages": [USER, ASSISTANT, {"role": "tool", "content": "A", "name": 3}]}, r"\[2\]\.name must be a string"),
        ({"messages": [{"content": "A"}]}, "got None"),
        ({"conversations": [{"from": "bot", "value": "A"}]}, r"conversations\[0\]\.from must be one of .*, got 'bot'"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "first and the only one"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "first and the only one"),
        ({"messages": [SYSTEM, USER]}, "no assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": "a\0"}]}, "NUL"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc80"}]}, "lone surrogates"),
        ({"instruction": "Q", "output": ""}, "output is empty"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "input must be a string, got int"),
        ({"prompt": "Q", "completion": None}, "no conversation"),
    ],
)
def test_bad_conversations(shape: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        messages_of(row(**shape))
    assert str(caught.value).startswith("rows.jsonl:7: ")
