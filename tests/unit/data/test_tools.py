"""The commands around data: inspect a batch, train a tokenizer, convert one, benchmark."""

import json
import subprocess
from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import Tokenizer
from tests.forked import python
from tests.support import ROOT, preference_rows, text_rows, tiny_tokenizer, write_jsonl

GREENS = {"1;32", "1;92"}  # two shades


def tool(name: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return python(str(ROOT / "tools" / f"{name}.py"), *arguments, cwd=cwd, variables=variables)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "text.jsonl", text_rows(40))
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(20))
    chat = [{"role": "user", "content": "over"}, {"role": "assistant", "content": "quick brown fox"}]
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}, {"messages": chat * 30}, {"messages": []}])
    return tmp_path


def inspect(folder: Path, recipe: str, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    common = (
        "data.val=null",
        "init_from=null",
        "data.tokenizer=tokenizer",
        "global_batch_size=4",
        "micro_batch_size=4",
    )
    return tool("inspect_batch", f"recipe=quickstart-{recipe}", *common, *overrides, cwd=folder, **variables)


def test_what_is_trained_is_green_and_what_was_left_out_is_counted(folder: Path) -> None:
    options = ("data.train=chat.jsonl", "data.bad_rows=skip", "data.sequence_length=100")
    result = inspect(folder, "sft", *options, FORCE_COLOR="1")
    assert result.returncode == 0, result.stderr
    row, *_ = (_runs(line) for line in result.stdout.splitlines() if "eot_id" in line)
    assert "".join(text for colour, text in row if colour in GREENS) == "quick brown fox<|eot_id|>"
    assert (
        "".join(text for _, text in row) == "<|begin_of_text|>User: over<|eot_id|>Assistant: quick brown fox<|eot_id|>"
    )
    assert "1 items in 1 rows" in result.stdout
    assert "0 truncated, 1 dropped" in result.stdout
    assert "1 of 3 source rows are bad and were skipped" in result.stdout


def _runs(line: str) -> list[tuple[str, str]]:
    """(colour, text) of each coloured piece."""
    pieces = [piece.partition("m") for piece in line.split("\x1b[") if piece]
    return [(code, text) for code, _, text in pieces if text]


@pytest.mark.parametrize(("recipe", "file"), [("pretrain", "text.jsonl"), ("dpo", "pairs.jsonl")])
def test_any_kind_can_be_inspected(folder: Path, recipe: str, file: str) -> None:
    result = inspect(folder, recipe, f"data.train={file}", "--step", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("row 0: ") == 1
    assert ("rejected row 4" in result.stdout) == (recipe == "dpo")
    assert "\x1b" not in result.stdout


def test_a_wrong_override_is_one_line(folder: Path) -> None:
    result = inspect(folder, "sft", "data.train=nothing.jsonl")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "nothing.jsonl: no such file" in result.stderr


def test_a_tokenizer_of_ones_own_text(folder: Path) -> None:
    result = tool("train_tokenizer", "out", "--data", "text.jsonl", "pairs.jsonl", "--vocab-size", "300", cwd=folder)
    assert (result.returncode, result.stdout) == (0, "out: 300 tokens\n")
    assert Tokenizer.from_folder(folder / "out").vocab_size == 300
    result = tool("train_tokenizer", "out", "--data", "text.jsonl", "--vocab-size", "10", cwd=folder)
    assert (result.returncode, result.stderr) == (2, "error: vocab_size must be at least 259, got 10\n")


def test_a_conversion_of_something_else(folder: Path) -> None:
    result = tool("convert_tokenizer", "text.jsonl", "out", cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: text.jsonl: every line must be a base64 token and its rank")
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_the_benchmark_measures_what_it_says(folder: Path) -> None:
    ways = ("encode_batch", "cache")
    options = ("--megabytes", "0.2", "--tokenizer", "tokenizer", "--json", "out.json", "--ways", *ways)
    result = tool("benchmark_data", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "out.json").read_text())
    documents = found["cache"]["tokens"] - found["encode_batch"]["tokens"]
    assert 0 < documents < 1000  # BOS and EOS of each
    assert found["cache"]["memory_mb"] > 0
