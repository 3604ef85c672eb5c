"""The token cache: built once, by any number of processes, killed or not, with the same bytes; never a wrong one."""

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from bitnet_train.data import cache, digests, store, workers
from bitnet_train.data.cache import nth_row, tokenized
from bitnet_train.data.encoding import ChatEncoder, Encoder, PairEncoder, TextEncoder
from bitnet_train.data.sources import BadRow, Row
from bitnet_train.data.store import TokenStore, ids_of, trained_of
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.data.workers import Chunk
from bitnet_train.errors import UserError
from tests.support import chat_rows, environment, preference_rows, sentence, text_rows, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
TEXT = TextEncoder(TOKENIZER)
ROWS = 120


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "text.jsonl", text_rows(ROWS)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_CHUNK_ROWS", 7)


def build(path: str | list[str], encoder: Encoder = TEXT, **options: object) -> TokenStore:
    """Builds into the folder "cache" beside the first path."""
    paths = [path] if isinstance(path, str) else path
    return tokenized(paths, encoder, Path(paths[0]).parent / "cache", **options)  # type: ignore[arg-type]


def stores(path: str) -> list[Path]:
    return sorted(file.parent for file in Path(path).parent.glob("cache/tokens/*/manifest.json"))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def sequences(found: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(ids_of(found[i]).tolist(), trained_of(found[i]).tolist()) for i in range(len(found))]


# ---- what it holds ----


def test_documents_come_back_with_bos_and_eos(text: str) -> None:
    found = build(text)
    ids = [[TOKENIZER.bos_token_id, *TOKENIZER.encode(sentence(i)), TOKENIZER.eos_token_id] for i in range(ROWS)]
    assert sequences(found) == [(document, [True] * len(document)) for document in ids]
    assert found.rows.tolist() == list(range(ROWS))
    assert isinstance(found.tokens, np.memmap)


def test_an_empty_text_gives_no_document_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}]))
    found = build(path)
    assert found.rows.tolist() == [0, 2]
    assert nth_row([path], int(found.rows[1])) == f"{path}:3"


def test_a_pair_is_two_sequences(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", preference_rows(3))
    found = build(str(path), PairEncoder(TOKENIZER))
    assert len(found) == 6
    (chosen, mask), (rejected, _) = sequences(found)[:2]
    prompt = mask.index(True)
    assert chosen[:prompt] == rejected[:prompt]
    assert TOKENIZER.decode(chosen[prompt:]) == f"{sentence(1)}<|eot_id|>"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "encoder", [TEXT, ChatEncoder(TOKENIZER), PairEncoder(TOKENIZER)], ids=["text", "chat", "pair"]
)
def test_processes_and_chunks_do_not_change_a_byte(tmp_path: Path, encoder: Encoder) -> None:
    rows = [a | b | c for a, b, c in zip(text_rows(50), chat_rows(50), preference_rows(50), strict=True)]
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
    one = build(str(tmp_path / "one/rows.jsonl"), encoder, num_proc=1)
    three = build(str(tmp_path / "three/rows.jsonl"), encoder, num_proc=3)
    assert content(one._folder) == content(three._folder)  # type: ignore[arg-type]
    assert one.fingerprint == three.fingerprint


def test_it_travels_to_another_process_as_a_name(text: str) -> None:
    found = build(text)
    pickled = pickle.dumps(found)
    assert len(pickled) < 500
    assert sequences(pickle.loads(pickled)) == sequences(found)


# ---- when it is built ----


def test_a_second_start_reads_what_is_there(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(text)
    monkeypatch.setattr(cache, "_build", None)
    assert build(text).fingerprint == first.fingerprint
    moved = Path(text).rename(Path(text).with_name("renamed.jsonl"))
    os.utime(moved)
    assert build(str(moved)).fingerprint == first.fingerprint


def test_the_key_sees_content_tokenizer_template_settings_and_code(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = str(write_jsonl(Path(text).with_name("chats.jsonl"), chat_rows(5)))
    other = train_bpe([sentence(i) for i in range(50)], 300)
    templated = tiny_tokenizer()
    templated.chat_template = templated.chat_template.replace(": ", " says: ")
    build(text)
    build(text, TextEncoder(other))
    for encoder in (ChatEncoder(TOKENIZER), ChatEncoder(templated), ChatEncoder(TOKENIZER, "last")):
        build(chats, encoder)
    assert len(stores(text)) == 5
    write_jsonl(Path(text), text_rows(ROWS - 1))
    build(text)
    assert len(stores(text)) == 6
    monkeypatch.setattr(cache, "_code_version", lambda: "another")
    build(text)
    assert len(stores(text)) == 7


def test_a_large_file_is_hashed_again_only_when_it_has_changed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING", 0)
    memory, file = Path(text).with_name("digests"), Path(text)
    os.utime(file, (1e9, 1e9))
    digest = digests.file_digest(file, memory)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "sha256_of", None)
        assert digests.file_digest(file, memory) == digest
    file.write_bytes(file.read_bytes().replace(b"fox", b"dog"))
    assert digests.file_digest(file, memory) != digest
    monkeypatch.setattr(digests, "sha256_of", None)
    with pytest.raises(TypeError):  # changed just now: not remembered
        digests.file_digest(file, memory)


def test_a_data_set_of_the_hub_is_keyed_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["one", "one", "two"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: SimpleNamespace(hash=next(commits)))
    rows = datasets.Dataset.from_list(text_rows(3)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.chdir(tmp_path)
    for count in (1, 1, 2):
        assert len(tokenized(["owner/name:config@split"], TEXT, tmp_path / "cache", num_proc=1)) == 3
        assert len(stores(str(tmp_path / "any"))) == count


# ---- torn and foreign ----


def cut(folder: Path) -> None:
    os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size - 4)


def flip(folder: Path) -> None:
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tokens.bin").write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "ends.bin").unlink()


def unseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def tear_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-5])


def adopt(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"key": "0" * 64}))


@pytest.mark.parametrize("damage", [cut, flip, lose, unseal, tear_manifest, adopt])
def test_a_torn_or_foreign_store_is_built_again(text: str, damage: object) -> None:
    build(text)
    (folder,) = stores(text)
    whole = content(folder)
    assert callable(damage)
    damage(folder)
    build(text)
    assert content(folder) == whole


# ---- kills and neighbours ----

BUILDER = """
import os, signal, sys
from pathlib import Path
from bitnet_train.data import cache, store, workers
from bitnet_train.data.encoding import TextEncoder
from tests.support import tiny_tokenizer

path, appends = sys.argv[1], int(sys.argv[2])
workers._CHUNK_ROWS, cache._COMMIT_TOKENS = 7, 300
append = store.StoreWriter.append

def counted(self, *chunk):
    global appends
    append(self, *chunk)
    appends -= 1
    if not appends:
        for file in self._files.values():
            file.flush()  # what was never committed is on the disk, too
        os.kill(os.getpid(), signal.SIGKILL)

store.StoreWriter.append = counted
found = cache.tokenized([path], TextEncoder(tiny_tokenizer()), Path(path).parent / "cache", num_proc=2)
print(found.fingerprint)
"""


def start_builder(path: str, appends: int = -1) -> "subprocess.Popen[str]":
    """A process that builds with two workers, and kills itself after so many chunks."""
    command = [sys.executable, "-c", BUILDER, path, str(appends)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(path).parent
    )


def test_killed_while_it_is_built_it_goes_on_and_ends_with_the_same_bytes(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(text)
    (folder,) = stores(text)
    whole = content(folder)
    shutil.rmtree(folder)
    committed = 0
    for _ in range(2):
        builder = start_builder(text, appends=6)
        assert (builder.communicate()[1], builder.returncode) == ("", -signal.SIGKILL)
        progress = json.loads((folder.with_name(f"{folder.name}.partial") / "progress.json").read_text())
        assert progress["rows"] > committed
        committed = progress["rows"]
    encoded: list[Row | BadRow] = []
    monkeypatch.setattr(workers, "encoded_rows", _noting(workers.encoded_rows, encoded))
    build(text)
    assert content(folder) == whole
    assert len(encoded) == ROWS - committed


def _noting(encode: Callable[..., Chunk], rows: list[Row | BadRow]) -> Callable[..., Chunk]:
    def noted(encoder: Encoder, chunk: Sequence[Row | BadRow]) -> Chunk:
        rows.extend(chunk)
        return encode(encoder, chunk)

    return noted


def test_two_processes_that_build_at_once_end_with_one_store(text: str) -> None:
    builders = [start_builder(text) for _ in range(3)]
    results = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], results
    assert {out for out, _ in results} == {build(text).fingerprint + "\n"}
    assert len(stores(text)) == 1
    assert not list(Path(text).parent.glob("cache/tokens/*.partial"))


@pytest.mark.parametrize("damage", ["cut", "foreign", "no progress"])
def test_a_torn_beginning_is_thrown_away(text: str, damage: str) -> None:
    build(text)
    (folder,) = stores(text)
    whole = content(folder)
    shutil.rmtree(folder)
    start_builder(text, appends=6).communicate()
    partial = folder.with_name(f"{folder.name}.partial")
    progress = json.loads((partial / "progress.json").read_text())
    if damage == "cut":
        os.truncate(partial / "tokens.bin", progress["bytes"]["tokens.bin"] - 1)
    elif damage == "foreign":
        (partial / "progress.json").write_text(json.dumps(progress | {"key": "0" * 64}))
    else:
        (partial / "progress.json").unlink()
    build(text)
    assert content(folder) == whole


def test_a_cache_that_cannot_be_written_is_an_error(text: str) -> None:
    (Path(text).parent / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*cache/tokens cannot be written"):
        build(text)


# ---- bad rows ----

BAD_LINES = ['{"text": 3}', "{broken", '{"text": "a", "text": "b"}', '{"body": "a"}']


@pytest.fixture
def bad(tmp_path: Path) -> str:
    lines = [json.dumps({"text": sentence(i)}) for i in range(20)]
    for place, line in zip((3, 9, 11, 17), BAD_LINES, strict=True):
        lines[place] = line
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "bad.jsonl")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_bad_row_is_an_error(bad: str, num_proc: int) -> None:
    with pytest.raises(
        UserError, match=rf"^{re.escape(bad)}:4: text must be a string, got an integer \(.*data.bad_rows=skip"
    ):
        build(bad, num_proc=num_proc)
    assert stores(bad) == []
    assert not list(Path(bad).parent.glob("cache/tokens/*.partial"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_rows_can_be_skipped_and_are_counted_at_every_start(
    bad: str, num_proc: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        found = build(bad, num_proc=num_proc, bad_rows="skip")
        assert found.rows.tolist() == [row for row in range(20) if row not in (3, 9, 11, 17)]
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{bad}: 4 of 20 rows are bad and were skipped: {bad}:4: text must be" in line
        assert f"{bad}:10: the line is no JSON" in line
    with pytest.raises(UserError, match=":4: text must be a string"):
        build(bad)  # the same store under the other rule


def test_a_store_of_nothing_but_bad_rows_is_empty(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(BAD_LINES))
    assert len(build(str(tmp_path / "bad.jsonl"), bad_rows="skip")) == 0


def test_numbers_in_the_manifest_are_those_of_the_rows(text: str) -> None:
    found = build(text)
    assert found.counts == store.Counts(rows=ROWS, tokens=int(found.ends[-1]))


def test_a_cache_without_file_locks_is_built_all_the_same(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(build(text)) == ROWS
    assert build([text]).fingerprint == build(text).fingerprint
    assert [record.message for record in caplog.records] == [
        f"{stores(text)[0].parent}: its file system has no locks (Function not implemented); let no two machines write "
        "there at once"
    ]
