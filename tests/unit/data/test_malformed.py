"""Rows that are wrong, in every shape: one line that names file and row, or, when asked, left out and counted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.data.config import ChatData, DataConfig, PreferenceData, TextData
from bitnet_train.errors import UserError
from tests.support import sentence, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTH = 120

Fields = dict[str, Any]
USER, SYSTEM = {"role": "user", "content": "Q"}, {"role": "system", "content": "S"}


def said(content: object) -> Fields:
    return {"role": "assistant", "content": content}


# Each shape: the configuration that reads it, and a row whose answer is given.
SHAPES: dict[str, tuple[Callable[..., DataConfig], Callable[[Any], Fields]]] = {
    "text": (TextData, lambda text: {"text": text}),
    "messages": (ChatData, lambda text: {"messages": [USER, said(text)]}),
    "sharegpt": (
        ChatData,
        lambda text: {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}]},
    ),
    "alpaca": (ChatData, lambda text: {"instruction": "Q", "input": "", "output": text}),
    "prompt, completion": (ChatData, lambda text: {"prompt": "Q", "completion": text}),
    "explicit strings": (PreferenceData, lambda text: {"prompt": "Q", "chosen": text, "rejected": "no"}),
    "explicit messages": (
        PreferenceData,
        lambda text: {"prompt": [USER], "chosen": [said(text)], "rejected": [said("no")]},
    ),
    "implicit messages": (PreferenceData, lambda text: {"chosen": [USER, said(text)], "rejected": [USER, said("no")]}),
}

Row = Callable[[Any], Fields]


def without_the_answer(row: Row) -> Fields:
    fields = row("A")
    fields.popitem() if "chosen" not in fields else fields.pop("chosen")
    return fields | {"id": 1}


# What is wrong: the line in the file, made of the shape's row, and what the message says.
VARIANTS: dict[str, tuple[Callable[[Row], str], str]] = {
    "bad JSON": (lambda row: json.dumps(row("A"))[:-1], "the line is no JSON"),
    "no object": (lambda row: json.dumps([row("A")]), "the line is a list; write one object per line"),
    "wrong type": (lambda row: json.dumps(row(3)), "must be a string, got an integer"),
    "parts instead of text": (
        lambda row: json.dumps(row({"text": "A"})),
        r"must be .*got an object|must be one of .*got None",
    ),
    "missing field": (lambda row: json.dumps(without_the_answer(row)), "no field|no conversation|must be a list"),
    "null content": (lambda row: json.dumps(row(None)), "got null|no conversation|no field"),
    "blank": (lambda row: json.dumps(row(" \n")), "is empty; drop the row"),
    "lone surrogate": (lambda row: json.dumps(row("A\ud800")), "NUL bytes or lone surrogates"),
    "NUL byte": (lambda row: json.dumps(row("A\0")), "NUL bytes or lone surrogates"),
    "one name twice": (lambda row: '{"id": 1, "id": 2, ' + json.dumps(row("A"))[1:], "'id' twice in one object"),
    "Latin-1": (lambda row: json.dumps(row("Ä"), ensure_ascii=False), "byte 0xc4 at .* is not UTF-8"),
    "UTF-16": (lambda row: "\ufeff" + json.dumps(row("A")), "the byte order mark says UTF-16"),
}
ENCODINGS = {"Latin-1": "latin-1", "UTF-16": "utf-16-le"}

# Only messages can be in disorder.
DISORDER: dict[str, tuple[list[Fields], str]] = {
    "two system messages": ([SYSTEM, SYSTEM, USER, said("A")], "system message must be the first and the only one"),
    "system in the middle": ([USER, SYSTEM, said("A")], "system message must be the first and the only one"),
    "assistant first": ([said("A"), USER, said("A")], "turns, user first; turn 1 is assistant"),
    "two answers": ([USER, said("A"), said("B")], "turns, user first; turn 3 is assistant|must end with a user"),
    "two questions": ([SYSTEM, USER, USER, said("A")], "turns, user first; turn 2 is user"),
    "unknown role": ([USER, {"role": "bot", "content": "A"}], "role must be one of system, user, .*got 'bot'"),
    "a tool that nobody called": (
        [USER, {"role": "tool", "content": "A"}],
        "turns, user first; turn 2 is tool|one assistant message after the shared prompt, got tool",
    ),
    "no role": ([USER, {"content": "A"}], "role must be one of .*got None"),
}


def cases() -> Iterator[Any]:
    for shape, (config, row) in SHAPES.items():
        for variant, (line, message) in VARIANTS.items():
            if shape == "text" and variant == "blank":
                continue  # an empty document is no error: data sets mark gaps by them
            encoding = ENCODINGS.get(variant, "utf-8")
            yield pytest.param(config, row, line(row).encode(encoding), message, id=f"{shape}, {variant}")
    for variant, (messages, message) in DISORDER.items():
        for shape in ("messages", "implicit messages"):
            config, row = SHAPES[shape]
            fields = {"messages": messages} if shape == "messages" else _as_pair(messages)
            yield pytest.param(config, row, json.dumps(fields).encode(), message, id=f"{shape}, {variant}")


def _as_pair(messages: list[Fields]) -> Fields:
    return {"chosen": messages, "rejected": [*messages[:-1], messages[-1] | {"content": "no"}]}


@pytest.mark.parametrize(("config", "row", "line", "message"), list(cases()))
def test_a_bad_row_is_named_or_skipped(
    config: Callable[..., DataConfig],
    row: Row,
    line: bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row(sentence(i))).encode() for i in range(3)]
    path.write_bytes(b"\n".join([good[0], line, *good[1:]]))
    cache = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=rf"^{path}:2: .*({message}).*data\.bad_rows=skip\)$") as error:
        config(LENGTH, **cache).rows(str(path), TOKENIZER)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).count(str(path)) == 1
    rows = config(LENGTH, bad_rows="skip", **cache).rows(str(path), TOKENIZER)
    path.write_bytes(b"\n".join(good))
    assert rows.fingerprint == config(LENGTH, **cache).rows(str(path), TOKENIZER).fingerprint
    assert f"{path}: 1 of 4 rows are bad and were skipped: {path}:2: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["text", "messages"])
def test_a_row_of_10_megabytes(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, row = SHAPES[shape]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row(text)) for text in ("A", "lorem ipsum " * 870_000, "B")))
    cache = {"cache_dir": str(tmp_path / "cache")}
    rows = config(LENGTH, **cache).rows(str(path), TOKENIZER)
    if shape == "text":
        assert len(rows) * LENGTH > 1_000_000  # cut into rows
        return
    assert "1 of 3 rows dropped" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"^{path}:2: the row has \d{{7,}} tokens, data.sequence_length allows 121"):
        config(LENGTH, long_rows="error", **cache).rows(str(path), TOKENIZER)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_share_an_id_are_rows_all_the_same(shape: str, tmp_path: Path) -> None:
    """An id is not read: many sets count anew in every file."""
    config, row = SHAPES[shape]
    path = tmp_path / "rows.jsonl"
    counts = []
    for ids in ((1, 2), (1, 1)):
        path.write_text("\n".join(json.dumps({"id": id} | row(sentence(i))) for i, id in enumerate(ids)))
        counts.append(config(LENGTH, cache_dir=str(tmp_path / "cache")).rows(str(path), TOKENIZER).fingerprint)
    assert counts[0] == counts[1]
