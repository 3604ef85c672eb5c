"""Streaming: the rows of a token cache without one, each block tokenized when a lane comes to it."""

import gzip
import json
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import ipc, parquet
from torch.utils.data import DataLoader

from bitnet_train.data import counting, streaming, workers
from bitnet_train.data.config import TextData
from bitnet_train.data.encoding import Encoder
from bitnet_train.data.module import DataModule
from bitnet_train.data.packing import StreamRows
from bitnet_train.data.sources import BadRow, Row
from bitnet_train.data.streaming import StreamedRows, TokenStream
from bitnet_train.errors import UserError
from tests.support import sentence, text_rows, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
LENGTH = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three or four documents per block."""
    monkeypatch.setattr(counting, "BLOCK_CHARACTERS", 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A shard of every kind, with gaps, blank lines, a bad row and documents shorter and longer than a row."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = text_rows(80)
    lines = [json.dumps(row) for row in rows[:25]]
    lines[3:3] = ['{"text": ""}', "", "  ", '{"text": 5}', '{"text": "' + 30 * "long " + '"}']
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows[25:45]).encode()))
    (folder / "c.txt").write_text("one")
    (folder / "d.txt").write_text("two")
    parquet.write_table(pyarrow.Table.from_pylist(rows[45:60]), folder / "e.parquet", row_group_size=4)
    table = pyarrow.Table.from_pylist(rows[60:])
    with ipc.new_stream(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return folder


def config(train: Path | str, streaming: bool = True, bad_rows: str = "skip") -> TextData:
    cache = Path(train).parent / "cache"
    return TextData(LENGTH, train=str(train), streaming=streaming, bad_rows=bad_rows, cache_dir=str(cache))


def streamed(train: Path | str, bad_rows: str = "skip") -> StreamedRows:
    rows = config(train, bad_rows=bad_rows).training_rows(TOKENIZER)
    assert isinstance(rows, StreamedRows)
    return rows


def contents(rows: StreamRows, numbers: range) -> list[list[list[int]]]:
    return [[field.tolist() for field in rows[number]] for number in numbers]


# ---- rows ----


def test_rows_are_those_of_the_cache(corpus: Path) -> None:
    rows, cached = streamed(corpus), config(corpus, streaming=False).training_rows(TOKENIZER)
    assert isinstance(cached, StreamRows)
    assert len(rows) == len(cached)
    expected = contents(cached, range(len(cached)))
    assert contents(rows, range(len(rows))) == expected
    backwards = range(len(rows) - 1, -1, -1)
    assert contents(rows, backwards) == expected[::-1]


def test_no_token_is_written_and_few_numbers_are(corpus: Path) -> None:
    rows = streamed(corpus)
    contents(rows, range(len(rows)))
    (counts,) = (file for file in (corpus.parent / "cache").rglob("*") if file.suffix not in ("", ".lock", ".TAG"))
    assert counts.parent.name == "counts"
    (stream,) = rows.streams
    assert stream.size == sum(len(stream._whole(block)[0]) for block in range(len(stream.starts) - 1))


def test_it_travels_to_another_process(corpus: Path) -> None:
    rows = streamed(corpus)
    there = pickle.loads(pickle.dumps(rows))
    assert contents(there, range(5)) == contents(rows, range(5))


# ---- work and memory ----


@pytest.mark.parametrize("ranks", [1, 4])
def test_blocks_are_tokenized_once_and_not_kept(corpus: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those in which a lane begins or an epoch ends; and a rank tokenizes what it reads alone."""
    whole: Counter[int] = Counter()
    tokenized = TokenStream._tokenized
    monkeypatch.setattr(
        TokenStream, "_tokenized", lambda self, block, rows: whole.update([block]) or tokenized(self, block, rows)
    )
    data = DataModule(config(corpus), TOKENIZER, seed=1, global_batch_size=8, micro_batch_size=2)
    rows = data.row_sets["train"]
    assert isinstance(rows, StreamedRows)
    data.steps = len(rows) // 8
    for rank in range(ranks):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)  # type: ignore[assignment]
        (stream,) = rows.streams
        stream._recent.clear()
        stream._reads.clear()
        most = max(len(stream._recent) for _ in data.train_dataloader())
        assert most == 8 // ranks
    blocks = sum(count > 0 for count in rows.rows_by_block())
    assert blocks > 20
    assert blocks - 8 <= whole.total() <= blocks + 8


def test_only_the_head_of_a_block_that_a_row_reaches_into_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = streamed(write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(i)[:20]} for i in range(60)]))
    (stream,) = rows.streams
    boundary = int(stream.starts[1] - 1) // LENGTH
    encoded: list[int] = []
    original = workers.encoded_rows

    def noted(encoder: Encoder, rows: Sequence[Row | BadRow]) -> workers.Chunk:
        encoded.append(len(rows))
        return original(encoder, rows)

    monkeypatch.setattr(streaming, "encoded_rows", noted)
    rows[boundary]
    assert encoded == [15, 1]


# ---- counting ----


def test_counting_goes_on_where_it_was_stopped(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(streamed(corpus), range(20))
    (file,) = (corpus.parent / "cache/counts").glob("*.npz")
    whole = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(counting, "_SAVE_TOKENS", 200)
    original, encoded = workers.encoded_rows, 0

    def stopping(*arguments: object) -> workers.Chunk:
        nonlocal encoded
        encoded += 1
        if encoded % 8 == 0:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "encoded_rows", stopping)
    starts = 0
    while file.read_bytes() != whole if file.exists() else True:
        starts += 1
        try:
            streamed(corpus)
        except KeyboardInterrupt:
            assert file.exists()
    assert 3 <= starts <= 6
    assert contents(streamed(corpus), range(20)) == expected


@pytest.mark.parametrize("damage", [b"", b"PK torn", None])
def test_torn_counts_are_counted_anew(corpus: Path, damage: bytes | None) -> None:
    fingerprint = streamed(corpus).fingerprint
    (file,) = (corpus.parent / "cache/counts").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:-40] if damage is None else damage)
    assert streamed(corpus).fingerprint == fingerprint
    assert file.read_bytes() == whole


def test_a_bad_row_is_named_before_the_first_step_or_skipped(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = re.escape(f"{corpus}/a.jsonl:7")
    with pytest.raises(UserError, match=rf"^{where}: text must be a string, got an integer .*data\.bad_rows=skip\)$"):
        streamed(corpus, bad_rows="error")
    for _ in range(2):
        streamed(corpus)
        assert re.search(rf"1 of 85 rows are bad and were skipped: {where}", capsys.readouterr().err)
    with pytest.raises(UserError, match=where):
        streamed(corpus, bad_rows="error")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("owner/name", "owner/name: data.streaming reads files; download the data set"),
        ("empty.jsonl", "empty.jsonl: the file holds no rows"),
        ("gap.jsonl", "gap.jsonl: every row is empty or bad"),
    ],
)
def test_what_cannot_be_streamed(train: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("gap.jsonl").write_text('{"text": ""}')
    with pytest.raises(UserError, match=message):
        TextData(LENGTH, train=train, streaming=True, cache_dir="cache").training_rows(TOKENIZER)


# ---- files that change ----


def test_a_changed_row_changes_the_fingerprint_and_a_moved_corpus_does_not(corpus: Path) -> None:
    fingerprint = streamed(corpus).fingerprint
    moved = corpus.rename(corpus.with_name("moved"))
    assert streamed(moved).fingerprint == fingerprint
    shard = moved / "a.jsonl"
    shard.write_text(shard.read_text().replace("quick", "kciuq", 1))
    assert streamed(moved).fingerprint != fingerprint


@pytest.mark.parametrize("content", ['{"text": "other"}\n', None])
def test_a_file_that_changes_under_a_run_is_an_error(tmp_path: Path, content: str | None) -> None:
    shard = write_jsonl(tmp_path / "a.jsonl", text_rows(20))
    rows = streamed(shard)
    shard.write_text(shard.read_text().replace("quick", "slow") if content is None else content)
    with pytest.raises(UserError, match=r"a\.jsonl: .*changed while it is trained on; restore it"):
        contents(rows, range(len(rows)))


def test_what_a_worker_says_is_one_line_as_well(tmp_path: Path) -> None:
    shard = write_jsonl(tmp_path / "a.jsonl", text_rows(20))
    rows = streamed(shard)
    shard.write_text(shard.read_text().replace("quick", "slow"))
    with pytest.raises(UserError, match=r"^\S*a\.jsonl: the file was changed while it is trained on[^\n]*$"):
        list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=list))  # type: ignore[arg-type]
