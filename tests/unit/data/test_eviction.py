"""Room in the cache: the last used stays, what is being built stays, and what is gone is built again."""

import fcntl
import os
import runpy
import sys
from pathlib import Path

import pytest

from bitnet_train.data import eviction
from bitnet_train.data.cache import tokenized
from bitnet_train.data.counting import counted
from bitnet_train.data.encoding import TextEncoder
from bitnet_train.data.eviction import Entry, entries, evict
from bitnet_train.data.store import TokenStore
from tests.support import ROOT, text_rows, tiny_tokenizer, write_jsonl

ENCODER = TextEncoder(tiny_tokenizer())


def build(folder: Path, rows: int) -> TokenStore:
    return tokenized([str(write_jsonl(folder / f"{rows}.jsonl", text_rows(rows)))], ENCODER, folder / "cache")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with stores of 10, 20 and 30 rows, and a reference, which were last used in this order."""
    cache = tmp_path / "cache"
    for rows in (10, 20, 30):
        build(tmp_path, rows)
    (cache / "reference-a-b.safetensors").write_bytes(b"x" * 100)
    for age, entry in enumerate(sorted(entries(cache), key=lambda entry: entry.tokens or sys.maxsize)):
        for path in entry.path.iterdir() if entry.path.is_dir() else [entry.path]:
            os.utime(path, (age, age))
    return cache


def test_the_last_used_is_first(cache: Path) -> None:
    found = entries(cache)
    assert [entry.used for entry in found] == [3.0, 2.0, 1.0, 0.0]
    assert found[0].tokens is None
    assert found[0].size == 100
    for entry in found[1:]:
        assert entry.tokens == len(TokenStore.open(entry.path).tokens)
        assert entry.size == sum(file.stat().st_size for file in entry.path.iterdir())


def test_what_was_not_used_for_longest_goes_first(cache: Path) -> None:
    *kept, oldest = entries(cache)
    assert evict(cache, sum(entry.size for entry in kept)) == [oldest]
    assert entries(cache) == kept
    assert evict(cache, sum(entry.size for entry in kept)) == []
    assert len(evict(cache, 0)) == 3
    assert entries(cache) == []


def test_a_store_that_is_used_again_stays_and_one_that_is_gone_is_built_again(cache: Path) -> None:
    oldest = entries(cache)[-1]
    before = build(cache.parent, 10).tokens.tolist()
    assert entries(cache)[0].path == oldest.path
    evict(cache, 0)
    assert build(cache.parent, 10).tokens.tolist() == before


def test_an_open_store_can_still_be_read(cache: Path) -> None:
    store = build(cache.parent, 20)
    before = store.tokens.tolist()
    evict(cache, 0)
    assert store.tokens.tolist() == before


def test_an_index_of_a_streamed_corpus_is_listed_and_counted_again(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", text_rows(10))
    before = counted([str(file)], ENCODER, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    assert entry.path.parent.name == "counts"
    assert entry.size == entry.path.stat().st_size
    os.utime(entry.path, (1, 1))
    counted([str(file)], ENCODER, tmp_path / "cache")
    assert entries(tmp_path / "cache")[0].used > 1
    assert [entry.path for entry in evict(tmp_path / "cache", 0)] == [entry.path]
    again = counted([str(file)], ENCODER, tmp_path / "cache")
    assert again.tokens.tolist() == before.tokens.tolist()
    assert again.counts == before.counts


def test_what_is_being_built_stays(cache: Path) -> None:
    oldest = entries(cache)[-1].path
    partial = oldest.rename(oldest.with_name(f"{oldest.name}.partial"))
    with oldest.with_name(f"{oldest.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        evict(cache, 0)
        assert [entry.path for entry in entries(cache)] == [partial]
    evict(cache, 0)
    assert entries(cache) == []


def test_what_vanishes_while_it_is_listed_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entries(cache)
    gone = [cache / "tokens" / "gone", cache / "counts" / "gone.npz"]
    monkeypatch.setattr(eviction, "_paths", lambda _: [*gone, *(entry.path for entry in found)])
    assert entries(cache) == found
    listed = [*found, *(Entry(path, 1, 0.0, None) for path in gone)]
    monkeypatch.setattr(eviction, "entries", lambda _: listed)
    assert evict(cache, 0) == listed
    assert not any(entry.path.exists() for entry in listed)


@pytest.mark.parametrize("manifest", ["[1]", '{"tokens": "x"}', "{}", "", "[" * 100_000])
def test_a_store_whose_manifest_is_broken_is_listed_without_tokens(cache: Path, manifest: str) -> None:
    store = next(entry.path for entry in entries(cache) if entry.tokens)
    (store / "manifest.json").write_text(manifest)
    assert [entry.tokens for entry in entries(cache) if entry.path == store] == [None]


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["cache.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "tools" / "cache.py"), run_name="__main__")
    assert exit.value.code is None or isinstance(exit.value.code, int)
    return exit.value.code


def test_the_tool_lists_and_removes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [entry.path.name[:8] for entry in entries(cache)]
    assert run_tool(monkeypatch, "--cache-dir", cache) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names)
    assert len(entries(cache)) == 4
    assert run_tool(monkeypatch, "--cache-dir", cache, "--keep", 0) == 0
    assert entries(cache) == []
    assert "removed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", -1], "argument --keep: must be at least 0, got -1"),
        (["--keep", "inf"], "argument --keep: must be finite, got inf"),
        (["--keep", "nan"], "argument --keep: must be finite, got nan"),
        (["--keep", "1e300"], "argument --keep: must be at most 1000000000.0, got 1e300"),
        ([], "no such folder"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    folder = tmp_path if arguments else tmp_path / "missing"
    assert run_tool(monkeypatch, "--cache-dir", folder, *arguments) == 2
    assert message in capsys.readouterr().err
