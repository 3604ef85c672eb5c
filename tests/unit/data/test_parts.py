"""A long document comes in parts, and its tokens are those of the whole text."""

import gzip
import json
import lzma
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import ipc, parquet
from tokenizers import models, pre_tokenizers, trainers

from bitnet_train.data import counting, parts, readers, tokenizer, workers
from bitnet_train.data.cache import tokenized
from bitnet_train.data.config import TextData
from bitnet_train.data.encoding import TextEncoder
from bitnet_train.data.notices import say_once
from bitnet_train.data.parts import anywhere, at_blanks, cut_text
from bitnet_train.data.readers import START, read_from
from bitnet_train.data.sources import read_rows
from bitnet_train.data.store import Counts, StoreWriter, ids_of
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.families import FAMILIES, write_family
from tests.support import tiny_tokenizer

PART, CONTEXT = 400, 60
SCRIPTS = (
    "The quick brown fox doesn't jump.",
    "x = {'a': [1234567, 2.5e-3]}  # comment",
    "Größe, naïve, e\u0301tude, “quotes” — dash…",
    "日本語の文章です。漢字とかな。",
    "Привет, мир! Это предложение.",
    "🙂🙃 e\u200dmoji 👩\u200d👩\u200d👧",
    "\tindented   spaces ",
    "<|eot_id|> </s> <unk> [SEP]",
    "",
    '\\ " / \b',
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few hundred characters, read in smaller stretches."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", PART)
    monkeypatch.setattr(tokenizer, "PART_CHARACTERS", PART)
    monkeypatch.setattr(tokenizer, "CONTEXT", CONTEXT)
    monkeypatch.setattr(parts, "CONTEXT", CONTEXT)
    monkeypatch.setattr(parts, "WINDOW", PART + CONTEXT)
    monkeypatch.setattr(readers, "WINDOW", PART + CONTEXT)
    monkeypatch.setattr(readers, "_READ_AT_ONCE", 97)
    monkeypatch.setattr(counting, "BLOCK_CHARACTERS", 300)
    say_once.cache_clear()


def text_of(lines: int, seed: int = 0) -> str:
    """Lines of many scripts, some of them long."""
    random.seed(seed)
    return "\n".join(" ".join(random.choices(SCRIPTS, k=random.randint(1, 9))) for _ in range(lines))


def as_txt(file: Path, text: str) -> Path:
    file = file.with_suffix(".txt")
    file.write_bytes(text.encode())
    return file


def as_txt_with_mark(file: Path, text: str) -> Path:
    file = file.with_suffix(".txt")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return file


def as_txt_gz(file: Path, text: str) -> Path:
    file = file.with_suffix(".txt.gz")
    file.write_bytes(gzip.compress(text.encode()))
    return file


def _line(text: str, ascii_only: bool) -> bytes:
    row = {"id": 7, "meta": {"text": "no"}, "text": text, "url": "a" * 20}
    return b"\n" + json.dumps(row, ensure_ascii=ascii_only).encode() + b'\n{"text": "next"}\n'


def as_jsonl(file: Path, text: str) -> Path:
    file = file.with_suffix(".jsonl")
    file.write_bytes(_line(text, ascii_only=False))
    return file


def as_jsonl_in_ascii(file: Path, text: str) -> Path:
    file = file.with_suffix(".json")
    file.write_bytes(_line(text, ascii_only=True))
    return file


def as_jsonl_xz(file: Path, text: str) -> Path:
    file = file.with_suffix(".jsonl.xz")
    file.write_bytes(lzma.compress(_line(text, ascii_only=True)))
    return file


def as_parquet(file: Path, text: str) -> Path:
    file = file.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "n": 1}, {"text": text, "n": 2}]), file)
    return file


def as_arrow(file: Path, text: str) -> Path:
    file = file.with_suffix(".arrow")
    table = pyarrow.Table.from_pylist([{"text": text}, {"text": "b"}])
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file


def as_saved(file: Path, text: str) -> Path:
    datasets.Dataset.from_list([{"text": "a"}, {"text": text}]).save_to_disk(str(file))
    return file


WRITERS: list[Callable[[Path, str], Path]] = [
    *(as_txt, as_txt_with_mark, as_txt_gz, as_jsonl, as_jsonl_in_ascii, as_jsonl_xz),
    *(as_parquet, as_arrow, as_saved),
]
named = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("as_"))


def documents(file: Path, encoder: TextEncoder, folder: Path) -> list[list[int]]:
    """The ids of the documents that a cache of the file holds."""
    store = tokenized([str(file)], encoder, folder)
    return [ids_of(store[number]).tolist() for number in range(len(store))]


@named
def test_a_cache_has_the_ids_of_the_whole_text(write: Callable[[Path, str], Path], tmp_path: Path) -> None:
    tokenizer, text = tiny_tokenizer(), text_of(60)
    file = write(tmp_path / "rows", text)
    found = documents(file, TextEncoder(tokenizer), tmp_path / "cache")
    wanted = [*tokenizer.begun(tokenizer.encode(text)), tokenizer.eos_token_id]
    assert wanted in found
    assert len(found) == len(list(read_rows(str(file))))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_tokenizers_is_cut_between_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_family(tmp_path, name))
    for seed in range(3):
        text = text_of(40, seed)
        pieces = [part for part, _ in cut_text(text, tokenizer.cut)]
        assert len(pieces) > 5
        assert "".join(pieces) == text
        rest = [id for ids in tokenizer.encode_batch(pieces[1:], continued=True) for id in ids]
        assert tokenizer.encode(pieces[0]) + rest == tokenizer.encode(text)


def _prefix_of_every_word() -> tokenizers.Tokenizer:
    """As T5's and XLM-R's: words apart, each with its space in front."""
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    return _trained(pre_tokenizers.Sequence(steps))


def _prefix_of_the_text() -> tokenizers.Tokenizer:
    return _trained(pre_tokenizers.Metaspace(prepend_scheme="first"))


def _prefix_behind_every_added_token() -> tokenizers.Tokenizer:
    backend = _trained(pre_tokenizers.Metaspace(prepend_scheme="always"))
    backend.add_tokens(["naïve", "jump"])
    return backend


def _digits_and_prefixed_bytes() -> tokenizers.Tokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    return _trained(pre_tokenizers.Sequence(steps), alphabet=pre_tokenizers.ByteLevel.alphabet())


def _trained(split: Any, alphabet: Sequence[str] = ()) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator([text_of(200, seed=9)], trainer)
    return backend


@pytest.mark.parametrize(
    "make",
    [_prefix_of_every_word, _prefix_of_the_text, _prefix_behind_every_added_token, _digits_and_prefixed_bytes],
    ids=lambda make: make.__name__.lstrip("_"),
)
def test_a_space_that_a_tokenizer_adds_is_added_where_it_is_in_the_whole(
    make: Callable[[], tokenizers.Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(make(), {"eos_token": "</s>"})
    for seed in range(3):
        text = text_of(40, seed)
        pieces = [part for part, _ in cut_text(text, tokenizer.cut)]
        assert len(pieces) > 5
        rest = [id for ids in tokenizer.encode_batch(pieces[1:], continued=True) for id in ids]
        assert tokenizer.encode(pieces[0]) + rest == tokenizer.encode(text)
    assert "inside a word" not in capsys.readouterr().err


@pytest.mark.parametrize("shift", range(16))
def test_a_stretch_ends_at_no_half_of_a_character(shift: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    text = "x" * shift + "\\ud83d 🙂\\\\ud83d\\\\\\ " * 60
    for ascii_only in (True, False):
        file.write_text(json.dumps({"text": text}, ensure_ascii=ascii_only))
        assert "".join(str(row.fields["text"]) for row in read_rows(str(file), cut=anywhere)) == text


def test_what_is_read_of_a_file_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"id": 1, "text": text_of(20, number), "url": "u"}) for number in range(20)))
    text = as_txt(tmp_path / "text", text_of(60))
    for path in (file, text):
        told: list[int] = []
        list(read_from(str(path), START, told.append, anywhere))
        assert path.stat().st_size <= sum(told) < path.stat().st_size + len(told) * (1 << 13)


def test_a_part_that_cannot_be_encoded_ends_the_build(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"good": 0, "</s>": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(Tokenizer(backend, {"eos_token": "</s>"}))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("good", "good " * 900 + "bad", "good")))
    with pytest.raises(UserError, match=rf"{file}:2: .*; a long document is not skipped, take it out"):
        tokenized([str(file)], encoder, tmp_path / "cache", bad_rows="skip")


def test_a_part_without_tokens_is_within_its_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a part ends no document: what is before it must not be committed."""
    writer = StoreWriter(tmp_path / "store", "key")
    none = np.empty(0, np.int64)
    writer.append(none, np.ones(5, np.uint32), none, Counts(tokens=5))
    writer.append(none, np.empty(0, np.uint32), none, Counts())
    assert not writer.is_whole
    writer.append(np.array([2]), np.ones(2, np.uint32), np.array([0]), Counts(rows=1, tokens=2))
    assert writer.is_whole
    writer.close()


@named
def test_reading_goes_on_behind_any_part(write: Callable[[Path, str], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "rows", text_of(30))
    encoder, saved = TextEncoder(tiny_tokenizer()), (tmp_path / "rows").is_dir()
    if saved:
        file = next(file.glob("*.arrow"))
    whole = list(read_from(str(file), START, cut=encoder.cut))
    assert sum(bool(place.inside) for place, _ in whole) > 5
    for number, (place, _) in enumerate(whole, start=1):
        assert list(read_from(str(file), place, cut=encoder.cut)) == whole[number:]


@named
def test_the_parts_of_a_row_are_its_text(write: Callable[[Path, str], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "rows", text_of(30))
    whole = [row.fields for row in read_rows(str(file))]
    for cut in (anywhere, at_blanks):
        joined: list[dict[str, object]] = []
        for row in read_rows(str(file), cut=cut):
            assert row.where.endswith(f":{row.number}")
            if row.begins:
                joined.append(dict(row.fields))
            else:
                assert list(row.fields) == ["text"]
                joined[-1]["text"] = f"{joined[-1]['text']}{row.fields['text']}"
        assert joined == whole


def _bad(error: str, data: bytes, suffix: str = ".jsonl") -> Any:
    return pytest.param(error, data, suffix, id=f"{suffix[1:]}-{error[:20].strip().replace(' ', '-')}")


LONG = text_of(30).encode()
JSON = json.dumps(text_of(30)).encode()[:-1]


@pytest.mark.parametrize(
    ("error", "data", "suffix"),
    [
        _bad("is not UTF-8", LONG + b"\xff", ".txt"),
        _bad("is not UTF-8; convert", LONG + b"\xe6\x97", ".txt"),
        _bad("NUL bytes", LONG + b"\0 more", ".txt"),
        _bad("UTF-16", b"\xff\xfe" + LONG, ".txt"),
        _bad("is not UTF-8", b'{"text": ' + JSON + b'\xff"}\n'),
        _bad("NUL bytes", b'{"text": ' + JSON + b'\\u0000"}\n'),
        _bad("lone surrogates", b'{"text": ' + JSON + b'\\ud83d x"}\n'),
        _bad("lone surrogates, which", b'{"text": ' + JSON + b'\\ude00"}\n'),
        _bad("is no JSON", b'{"text": ' + JSON + b"\n"),
        _bad("is no JSON (", b'{"text": ' + JSON),
        _bad("is no JSON (Inv", b'{"text": ' + JSON + b'\\x"}\n'),
        _bad("is no JSON (a", b'{"text": ' + JSON + b'\\u12zz and more than twelve"}\n'),
        _bad("is no JSON (Ex", b'{"text": ' + JSON + b'" 5}\n'),
        _bad("'text' twice", b'{"text": ' + JSON + b'", "text": "again"}\n'),
        _bad("'id' twice", b'{"id": 1, "text": ' + JSON + b'", "id": 2}\n'),
        _bad("NUL bytes", b'{"a": ' + JSON + b'", "text": "\\u0000"}\n'),
    ],
)
def test_a_bad_document_is_known_as_a_whole(error: str, data: bytes, suffix: str, tmp_path: Path) -> None:
    file, compressed = tmp_path / f"rows{suffix}", tmp_path / f"other{suffix}.gz"
    rest = b"" if suffix == ".txt" else b'{"text": "good"}\n' if data.endswith(b"\n") else b'\n{"text": "good"}\n'
    file.write_bytes(data + rest)
    compressed.write_bytes(gzip.compress(data + rest))
    encoder = TextEncoder(tiny_tokenizer())
    for path in (file, compressed):
        with pytest.raises(UserError) as found:
            tokenized([str(path)], encoder, tmp_path / "cache")
        assert error.split(" (")[0] in str(found.value)
        assert f"{path}:1" in str(found.value)
        if rest:
            store = tokenized([str(path)], encoder, tmp_path / "cache", bad_rows="skip")
            assert (len(store), store.counts.bad, store.counts.rows) == (1, 1, 2)
            assert ids_of(store[0]).tolist() == [
                *encoder.tokenizer.begun(encoder.tokenizer.encode("good")),
                encoder.tokenizer.eos_token_id,
            ]


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_and_processes_change_nothing(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": text_of(1 + 20 * (number % 3), number)} for number in range(9)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    encoder = TextEncoder(tiny_tokenizer())
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 700)
    small = tokenized([str(file)], encoder, tmp_path / "small", num_proc=processes)
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 1 << 20)
    large = tokenized([str(file)], encoder, tmp_path / "large")
    assert small.fingerprint == large.fingerprint
    assert np.array_equal(small.rows, large.rows)
    assert small.counts == large.counts


def test_a_killed_build_goes_on_at_the_border_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"word {number} " * 200}) for number in range(8)))
    encoder = TextEncoder(tiny_tokenizer())
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 700)
    monkeypatch.setattr("bitnet_train.data.cache._COMMIT_TOKENS", 1)
    whole = tokenized([str(file)], encoder, tmp_path / "whole")
    append, calls = StoreWriter.append, 0

    def killed(self: StoreWriter, *columns: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:  # a row takes two or three
            raise KeyboardInterrupt
        append(self, *columns)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "append", killed)
    for _ in range(40):
        try:
            store = tokenized([str(file)], encoder, tmp_path / "killed")
            break
        except KeyboardInterrupt:
            continue
    assert calls > 10
    assert store.fingerprint == whole.fingerprint
    assert store.counts == whole.counts


@named
def test_a_stream_has_the_rows_of_the_cache(write: Callable[[Path, str], Path], tmp_path: Path) -> None:
    file, other = write(tmp_path / "rows", text_of(60)), tmp_path / "short.jsonl"
    other.write_text("\n".join(json.dumps({"text": text_of(2, number)}) for number in range(8)))
    mixture = [{"path": str(file), "weight": 0.5}, {"path": str(other), "weight": 0.5}]
    for train in (str(file), mixture):
        kept, streamed = (
            TextData(16, train=train, streaming=streaming, cache_dir=str(tmp_path / "cache")).training_rows(
                tiny_tokenizer()
            )
            for streaming in (False, True)
        )
        assert len(kept) == len(streamed) > 20
        for number in range(len(kept)):
            for one, another in zip(kept[number], streamed[number], strict=True):
                assert np.array_equal(one, another)


def test_a_text_without_borders_is_cut_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    for text in ("ab" * 2000, "一二三" * 900):
        pieces = [part for part, _ in cut_text(text, tokenizer.cut)]
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= PART + CONTEXT
    assert "cut there, inside a word" in capsys.readouterr().err


def test_a_line_that_is_long_by_other_fields_is_read(tmp_path: Path) -> None:
    row = {"html": text_of(40), "text": "short", "more": ["x" * 900, {"text": text_of(40)}]}
    for ordered in (row, dict(reversed(row.items()))):
        file = tmp_path / "rows.jsonl"
        file.write_text(f"{json.dumps(ordered)}\n{' ' * 2000}\n{json.dumps({'text': 'next'})}")
        assert [row.fields for row in read_rows(str(file), cut=anywhere)] == [ordered, {"text": "next"}]


def test_a_tokenizer_learns_the_same_of_parts(tmp_path: Path) -> None:
    text = "\n".join(f"some words {number} of a text" for number in range(400))
    learnt = [
        Tokenizer.encode(tokenizer.train_bpe(texts, 300), "some words of a text")
        for texts in ([text], [part for part, _ in cut_text(text, at_blanks)])
    ]
    assert learnt[0] == learnt[1]
