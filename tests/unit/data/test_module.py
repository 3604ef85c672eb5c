"""What a run reads: the same rows in the same order for any ranks, workers and stops; mixtures; validation by name."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet_train.data import counting
from bitnet_train.data.batches import PairBatch, TokenBatch
from bitnet_train.data.config import ChatData, DataConfig, PreferenceData, TextData, sources_of
from bitnet_train.data.module import DataModule
from bitnet_train.data.packing import PackedRows, PairRows
from bitnet_train.errors import UserError
from tests.support import chat_rows, preference_rows, text_rows, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    write_jsonl(folder / "text.jsonl", text_rows(60))
    write_jsonl(folder / "more.jsonl", text_rows(90)[60:])
    write_jsonl(folder / "few.jsonl", text_rows(20))
    write_jsonl(folder / "chat.jsonl", chat_rows(60))
    write_jsonl(folder / "pairs.jsonl", preference_rows(37))
    return folder


def configs(folder: Path) -> dict[str, DataConfig]:
    """A run of every kind; the mixtures repeat one source one or two and a bit times."""
    cache: dict[str, Any] = {"cache_dir": str(folder / "cache")}
    mixture = [{"path": str(folder / name), "weight": w} for name, w in (("text.jsonl", 2.0), ("more.jsonl", 2.3))]
    few = {"path": str(folder / "few.jsonl"), "weight": 1.9}
    return {
        "text": TextData(32, train=str(folder / "text.jsonl"), **cache),
        "mixture": TextData(32, train=mixture, **cache),
        "streamed": TextData(32, train=[*mixture[1:], few], streaming=True, **cache),
        "chat": ChatData(127, train=str(folder / "chat.jsonl"), **cache),
        "pairs": PreferenceData(127, train=str(folder / "pairs.jsonl"), **cache),
    }


KINDS = ["text", "mixture", "streamed", "chat", "pairs"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is streamed has some twenty blocks, of four documents each."""
    monkeypatch.setattr(counting, "BLOCK_CHARACTERS", 300)


def module(config: DataConfig, steps: int, micro: int = 2, first_step: int = 0) -> DataModule:
    data = DataModule(config, TOKENIZER, seed=5, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro)
    data.steps, data.first_step = steps, first_step
    return data


def rows_of(batch: TokenBatch | PairBatch) -> list[str]:
    """A hash of each row of a batch, padding left out."""
    tokens = batch.tokens if isinstance(batch, PairBatch) else batch
    kept = [[field[i][tokens.document_ids[i] >= 0] for field in tokens] for i in range(len(tokens.input_ids))]
    return [hashlib.sha256(torch.stack(fields).numpy().tobytes()).hexdigest()[:8] for fields in kept]


def read(data: DataModule, ranks: int) -> list[list[str]]:
    """The rows of every optimizer step over all ranks, in the order of their positions."""
    batches: list[list[list[str]]] = []
    for rank in range(ranks):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)  # type: ignore[assignment]
        batches.append([rows_of(batch) for batch in data.train_dataloader()])
    in_order = [row for micro in zip(*batches, strict=True) for rows in micro for row in rows]
    width = len(in_order) // (data.steps - data.first_step)
    return [in_order[start : start + width] for start in range(0, len(in_order), width)]


def epoch_end(config: DataConfig) -> int:
    """The step in which the first epoch ends."""
    return int(module(config, 1).steps_per_epoch())


# ---- order ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_ranks_and_workers_read_the_same_rows_in_the_same_order(
    folder: Path, kind: str, ranks: int, num_workers: int
) -> None:
    config = configs(folder)[kind]
    steps = epoch_end(config) + 2
    expected = read(module(config, steps), ranks=1)
    parallel = type(config)(**{**config.__dict__, "num_workers": num_workers})
    micro = 1 if kind == "pairs" else 2  # a batch of pairs lists chosen, then rejected
    if kind == "pairs":
        expected = read(module(config, steps, micro=1), ranks=1)
    assert read(module(parallel, steps, micro), ranks) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_stop_at_any_step_the_rest_is_read(folder: Path, kind: str) -> None:
    """Stops one step before, in and one step after the end of the first epoch among them."""
    config = configs(folder)[kind]
    end = epoch_end(config)
    whole = read(module(config, end + 3), ranks=1)
    for stop in range(end + 3):
        assert read(module(config, end + 3, first_step=stop), ranks=1) == whole[stop:]


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_reads_every_row_once(folder: Path, kind: str) -> None:
    data = module(configs(folder)[kind], 1)
    count = len(data.row_sets["train"])
    order = data.micro_batches(0, 1)
    positions = [sample for step in range(2 * count) for sample in order.samples(step)]
    epochs = [positions[start : start + count] for start in range(0, len(positions), count)]
    if order.lengths is None:
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert set(Counter(positions).values()) == {2 * GLOBAL_BATCH}


def test_pairs_of_a_step_are_sorted_by_length_and_are_the_same_pairs(folder: Path) -> None:
    sorted_config = configs(folder)["pairs"]
    plain_config = PreferenceData(**{**sorted_config.__dict__, "group_by_length": False})
    grouped, plain = (module(config, 4).micro_batches(0, 1) for config in (sorted_config, plain_config))
    rows = module(sorted_config, 4).row_sets["train"]
    assert isinstance(rows, PairRows)
    for step in range(4):
        assert sorted(grouped.samples(step)) == sorted(plain.samples(step))
        lengths = rows.lengths[grouped.samples(step)].tolist()
        assert lengths == sorted(lengths, reverse=True)
    assert padding(grouped, rows) < 0.7 * padding(plain, rows)


def padding(order: Iterator[list[int]] | Any, rows: PairRows) -> int:
    batches = [rows.collate([rows[i] for i in numbers]).tokens for numbers in order]
    return sum(int((batch.document_ids < 0).sum()) for batch in batches)


# ---- mixtures ----


@pytest.mark.parametrize(("kind", "name", "share"), [("mixture", "text", 2.0 / 4.3), ("streamed", "few", 1.9 / 4.2)])
def test_a_mixture_has_the_shares_that_were_asked_for(folder: Path, kind: str, name: str, share: float) -> None:
    data = module(configs(folder)[kind], 1)
    epoch = -(-len(data.row_sets["train"]) // GLOBAL_BATCH)
    shares = data.token_shares(0, epoch)
    assert set(shares) == {f"share/{name}.jsonl", "share/more.jsonl"}
    assert shares[f"share/{name}.jsonl"] == pytest.approx(share, abs=0.03)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_realised_shares_are_those_of_the_tokens_that_were_read(tmp_path: Path) -> None:
    """Counted anew from the batches: one source says nothing but "a", the other nothing but "b"."""
    sizes = {"a": range(3, 40), "b": range(20, 30)}
    for letter, lengths in sizes.items():
        write_jsonl(tmp_path / f"{letter}.jsonl", [{"text": f" {letter}" * n} for n in lengths])
    train = [{"path": str(tmp_path / f"{letter}.jsonl"), "weight": 1 + (letter == "b")} for letter in "ab"]
    data = module(TextData(16, train=train, cache_dir=str(tmp_path)), steps=9)
    rows = data.row_sets["train"]
    spaced = {letter: set(TOKENIZER.encode(f" {letter}" * 40)) for letter in "ab"}
    assert not spaced["a"] & spaced["b"]
    order = data.micro_batches(0, 1)
    for step in range(9):
        ids = [id for sample in order.samples(step) for id in rows[sample].ids[:-1].tolist()]
        a, b = (sum(id in spaced[letter] for id in ids) for letter in "ab")
        share = data.token_shares(step, step + 1)["share/a.jsonl"]
        edges = len(ids) - a - b  # BOS and EOS, of either
        assert a / len(ids) <= share <= (a + edges) / len(ids)


def test_one_source_has_no_shares(folder: Path) -> None:
    assert module(configs(folder)["text"], 1).token_shares(0, 1) == {}


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_conversations_and_pairs_mix_by_tokens_too(folder: Path, kind: str) -> None:
    path = str(folder / ("chat.jsonl" if kind == "chat" else "pairs.jsonl"))
    other = folder / f"long-{kind}.jsonl"
    write_jsonl(other, (chat_rows(80) if kind == "chat" else preference_rows(80))[60:])
    cls = ChatData if kind == "chat" else PreferenceData
    train = [{"path": path, "weight": 1}, {"path": str(other), "weight": 3}]
    data = module(cls(127, train=train, cache_dir=str(folder / "cache")), 1)
    rows: Any = data.row_sets["train"]
    tokens = sum(rows.tokens_by_source(i) for i in range(len(rows)))
    assert tokens[1] / tokens.sum() == pytest.approx(0.75, abs=0.02)


# ---- sources and validation sets ----


def test_validation_sets_by_name(folder: Path) -> None:
    paths = {name: str(folder / f"{name}.jsonl") for name in ("text", "more")}
    base: dict[str, Any] = {"train": paths["text"], "cache_dir": str(folder / "cache")}
    both = module(TextData(32, val=paths, **base), 1)
    assert both.validation_names == ["val/text", "val/more"]
    assert [len(loader.dataset) for loader in both.val_dataloader()] == [  # type: ignore[arg-type]
        len(both.row_sets[f"val/{name}"]) for name in paths
    ]
    assert module(TextData(32, val=paths["more"], **base), 1).validation_names == ["val"]
    assert module(TextData(32, **base), 1).val_dataloader() == []


@pytest.mark.parametrize(
    "entry", [3, {"path": "a"}, [{"path": "a", "weight": 0}], [{"path": "a"}], [["a"]], {"a": "b"}]
)
def test_an_entry_that_is_no_path_is_an_error(entry: object) -> None:
    with pytest.raises(UserError, match=r"^data\.val\.x: an entry must be a path or \{path: \.\.\., weight: above 0\}"):
        sources_of(entry, "data.val.x")


def test_a_source_without_a_token_is_an_error(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}]))
    with pytest.raises(UserError, match=r"a\.jsonl: every row is empty or bad"):
        TextData(8, cache_dir=str(tmp_path)).rows(path, TOKENIZER)


@pytest.mark.parametrize(("size", "allowed"), [(1000, True), (1001, False), (10**12, False)])
def test_a_step_is_not_far_larger_than_the_data(tmp_path: Path, size: int, allowed: bool) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "one row"}]))
    config = TextData(64, train=path, cache_dir=str(tmp_path))
    expected = (
        nullcontext() if allowed else pytest.raises(UserError, match=r"at most 1000 times the 1 rows of data.train")
    )
    with expected:
        DataModule(config, TOKENIZER, seed=0, global_batch_size=size, micro_batch_size=1)


# ---- long rows ----


def test_long_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = str(folder / "chat.jsonl"), str(folder / "cache")
    lengths = ChatData(500, cache_dir=cache).rows(path, TOKENIZER)
    assert isinstance(lengths, PackedRows)
    sizes = lengths.items.lengths
    capacity = int(sorted(sizes)[30])
    long = sizes > capacity
    for rule, lost in (("drop", sizes[long].sum()), ("truncate", (sizes[long] - capacity).sum())):
        rows = ChatData(capacity - 1, cache_dir=cache, long_rows=rule).rows(path, TOKENIZER)
        assert isinstance(rows, PackedRows)
        assert rows.items.lengths.sum() == sizes.sum() - lost
        assert f"{long.sum()} of 60 rows {rule}" in (line := capsys.readouterr().err)
        assert f"{lost} tokens lost" in line
    with pytest.raises(UserError, match=rf"chat\.jsonl:{long.argmax() + 1}: the row has \d+ tokens"):
        ChatData(capacity - 1, cache_dir=cache, long_rows="error").rows(path, TOKENIZER)
    with pytest.raises(UserError, match="no row is left to train on"):
        ChatData(2, cache_dir=cache).rows(path, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_rows": "ignore"}, "data.bad_rows must be error or skip, got 'ignore'"),
        ({"long_rows": "split"}, "data.long_rows must be one of drop, truncate, error, got 'split'"),
        ({"train_on": "user"}, "data.train_on must be one of assistant, last, all, got 'user'"),
        ({"num_proc": 0}, "data.num_proc must be at least 1, or null, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"num_workers": 10**9}, r"data.num_workers must be at most \d+ on this machine, got 1000000000"),
        ({"num_proc": 10**7}, r"data.num_proc must be at most \d+ on this machine, got 10000000"),
        ({"sequence_length": 1}, "data.sequence_length must be at least 2, got 1"),
    ],
)
def test_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatData(**{"sequence_length": 8} | options)
