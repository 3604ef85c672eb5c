"""Names of data: folders as datasets, the hub and people leave them."""

import json
import os
from pathlib import Path

import datasets
import pytest

from bitnet_train.data.paths import expand, size_of
from bitnet_train.data.readers import START, Place
from bitnet_train.data.sources import read_blocks, read_rows
from bitnet_train.errors import UserError
from tests.support import chat_rows, text_rows, train, write_corpus, write_jsonl


def texts(path: Path | str) -> list[str]:
    return [str(row.fields["text"]) for row in read_rows(str(path))]


def numbered(count: int, word: str = "row") -> list[dict[str, object]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def saved(folder: Path, count: int = 5, shards: int = 2) -> Path:
    datasets.Dataset.from_list(numbered(count)).save_to_disk(folder, num_shards=shards)
    return folder


# ---- names ----


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
    assert [row.fields for row in read_rows("owner/name")] == [{"text": "here"}]


def test_a_file_name_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data/train\.jsonl: no such file or folder"):
        read_rows("data/train.jsonl")


# ---- save_to_disk ----


def test_what_save_to_disk_wrote_is_its_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "data")
    assert expand(str(folder)) == [str(folder)]
    assert texts(folder) == [f"row {number}" for number in range(5)]
    assert [row.where for row in read_rows(str(folder))][-1] == f"{folder}:5"
    assert (size_of(str(folder)) or 0) > sum(file.stat().st_size for file in folder.glob("data-*.arrow"))


@pytest.mark.parametrize("left", ["map", "shuffle", "filter"])
def test_what_work_left_in_the_folder_is_none_of_its_rows(tmp_path: Path, left: str) -> None:
    folder = saved(tmp_path / "data")
    data = datasets.load_from_disk(folder)
    work = {
        "map": lambda: data.map(lambda row: {"text": row["text"].upper()}),
        "shuffle": lambda: data.shuffle(seed=0),
        "filter": lambda: data.filter(lambda row: row["text"].endswith("1")),
    }
    work[left]()
    assert list(folder.glob("cache-*.arrow"))
    assert texts(folder) == [f"row {number}" for number in range(5)]
    assert texts(tmp_path) == [f"row {number}" for number in range(5)]  # also where it is one of several


def test_a_shuffled_data_set_that_was_saved_keeps_its_order(tmp_path: Path) -> None:
    shuffled = datasets.Dataset.from_list(numbered(9)).shuffle(seed=1).select(range(6))
    shuffled.save_to_disk(tmp_path / "data")
    assert texts(tmp_path / "data") == shuffled["text"]


def test_reading_a_saved_data_set_goes_on_at_any_row(tmp_path: Path) -> None:
    folder = saved(tmp_path / "data", count=70)
    whole = [block.rows[0] for block in read_blocks(str(folder), START, 1)]
    for start in (66, 70):
        assert [block.rows[0] for block in read_blocks(str(folder), Place(0, start), 1)] == whole[start:]


def test_a_saved_data_set_without_rows_says_so(tmp_path: Path) -> None:
    datasets.Dataset.from_list(numbered(2)).select([]).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="the file holds no rows"):
        texts(tmp_path / "data")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{", "cannot be read"),
        ("state.json", "[]", "must hold a JSON object, got list"),
        ("state.json", "{}", "_data_files must name the files"),
        ("data-00000-of-00002.arrow", "", "datasets cannot open it"),
    ],
)
def test_a_damaged_data_set_is_one_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = saved(tmp_path / "data")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        texts(folder)


# ---- splits ----


def splits(folder: Path, **counts: int) -> Path:
    data = {name: datasets.Dataset.from_list(numbered(count, name)) for name, count in counts.items()}
    datasets.DatasetDict(data).save_to_disk(folder)
    return folder


def test_of_several_splits_train_is_read_and_the_others_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = splits(tmp_path / "data", train=2, test=1, validation=3)
    capsys.readouterr()
    assert texts(folder) == ["train 0", "train 1"]
    told = f"data: {folder}: the split train is read, test, validation not (to name one: {folder}@test)\n"
    assert capsys.readouterr().err == told
    assert texts(f"{folder}@test") == ["test 0"]
    assert texts(f"{folder}@validation") == ["validation 0", "validation 1", "validation 2"]
    assert texts(folder) == ["train 0", "train 1"]
    assert capsys.readouterr().err == ""  # once is enough
    with pytest.raises(UserError, match=r"data@dev: no such split; the folder has test, train, validation"):
        texts(f"{folder}@dev")


def test_without_a_train_split_one_must_be_named(tmp_path: Path) -> None:
    folder = splits(tmp_path / "data", train_sft=1, test_sft=1)
    with pytest.raises(UserError, match=r"holds the splits test_sft, train_sft, no train; name one as .*@test_sft"):
        texts(folder)
    assert texts(f"{folder}@train_sft") == ["train_sft 0"]


def test_names_of_files_tell_splits_apart_as_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `datasets` pushes them: data/train-00000-of-00001.parquet."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "validation"):
        rows = datasets.Dataset.from_list(numbered(1, split))
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    write_jsonl(tmp_path / "more.jsonl", numbered(1, "more"))
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}))
    (tmp_path / "README.md").write_text("# card")
    assert sorted(texts(tmp_path)) == ["more 0", "train 0"]
    assert "the split train is read, test, validation not" in capsys.readouterr().err
    assert texts(f"{tmp_path}@test") == ["test 0"]


def test_without_a_file_of_train_all_are_read(tmp_path: Path) -> None:
    for name in ("test", "dev", "contest"):
        write_jsonl(tmp_path / f"{name}.jsonl", numbered(1, name))
    assert sorted(texts(tmp_path)) == ["contest 0", "dev 0", "test 0"]
    with pytest.raises(UserError, match=r"@train: no such split; the folder has test, validation"):
        texts(f"{tmp_path}@train")


# ---- what is no data ----


def test_files_that_are_no_rows_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", numbered(1))
    for name in ("dataset_infos.json", "dataset_info.json", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    for name in ("LICENSE.txt", "README.txt", "requirements-dev.txt", "vocab.txt"):
        (tmp_path / name).write_text("no document")
    assert texts(tmp_path) == ["row 0"]
    told = f"data: {tmp_path}: left alone, by their names no rows: LICENSE.txt, README.txt, config.json, "
    assert capsys.readouterr().err == told + "dataset_info.json, dataset_infos.json and 4 more\n"
    assert texts(tmp_path / "LICENSE.txt") == ["no document"]  # named, it is one


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "elsewhere" / "deep" / "a.jsonl", numbered(2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "z.jsonl").symlink_to(tmp_path / "elsewhere" / "deep" / "a.jsonl")  # read once
    assert texts(tmp_path / "data") == ["row 0", "row 1"]


def test_a_run_and_a_cache_within_the_folder_of_data_are_none(tmp_path: Path) -> None:
    """A run that would read its own metrics could not go on."""
    corpus = write_corpus(tmp_path, rows=20)
    (corpus / "data").mkdir()
    os.rename(corpus / "text.jsonl", corpus / "data" / "text.jsonl")
    overrides = [
        *("+recipe=quickstart-pretrain", "trainer=cpu", "model=tiny", "model.vocab_size=384"),
        *("model.num_hidden_layers=1", "data.train=data", "data.val=null", "data.tokenizer=tokenizer"),
        *("data.sequence_length=64", "data.cache_dir=data/cache", "global_batch_size=2", "micro_batch_size=2"),
        *("max_steps=2", "checkpoint_every=1", "log_every=1", "run_dir=data/run"),
    ]
    for _ in range(2):
        result = train(*overrides, cwd=corpus)
        assert result.returncode == 0, result.stderr
    assert (corpus / "data" / "run" / "metrics.jsonl").is_file()
    assert expand(str(corpus / "data")) == [str(corpus / "data" / "text.jsonl")]


def test_other_writers_of_rows_are_read(tmp_path: Path) -> None:
    """datasets to_json, and a split folder of parquet as `push_to_hub` lays it out."""
    datasets.Dataset.from_list(chat_rows(3)).to_json(tmp_path / "chat.jsonl")
    datasets.Dataset.from_list(text_rows(3)).to_json(tmp_path / "text.json")
    assert [row.fields for row in read_rows(str(tmp_path / "chat.jsonl"))] == chat_rows(3)
    assert [row.fields for row in read_rows(str(tmp_path / "text.json"))] == text_rows(3)
