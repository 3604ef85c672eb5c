"""The quickstart's data: enough of it, held out honestly, the same every time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitnet_train.data.chat import encode_chat
from bitnet_train.data.conversation import messages_of, text_of
from bitnet_train.data.preference import pair_of
from bitnet_train.data.sources import read_rows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.forked import python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_quickstart.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_quickstart", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool: Any = load_tool()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python(str(TOOL), *map(str, arguments), cwd=ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "data"
    result = run("--out", out, "--vocab-size", 1024)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((out / "summary.json").read_text())
    return out


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in read_rows(str(data / f"{name}.jsonl"))]


# ---- what was written ----


def test_everything_is_there_and_large_enough(data: Path) -> None:
    files = json.loads((data / "summary.json").read_text())["files"]
    least = {
        "pretrain/english": (20, 50_000),
        "pretrain/docstrings": (200, 250_000),
        "pretrain/code": (30, 150_000),
        "pretrain/heldout": (5, 8_000),
        "sft/train": (1400, 80_000),
        "sft/heldout": (120, 8_000),
        "dpo/train": (700, 80_000),
        "dpo/heldout": (60, 8_000),
        "code/train": (600, 80_000),
        "code/heldout": (60, 8_000),
    }
    assert {f"{file.parent.name}/{file.stem}" for file in data.glob("*/*.jsonl")} == set(least) == set(files)
    for name, (least_rows, least_tokens) in least.items():
        assert files[name]["rows"] >= least_rows
        assert files[name]["tokens"] >= least_tokens
        assert len(rows(data, name)) == files[name]["rows"]
        assert files[name]["too_long"] <= files[name]["rows"] // 20


def test_heldout_english_shares_no_passage_with_the_training_text(data: Path) -> None:
    heldout = [text_of(row) for row in read_rows(str(data / "pretrain" / "heldout.jsonl"))]
    assert 30_000 <= sum(len(text.encode()) for text in heldout) <= 120_000
    shared = set().union(*map(tool.passages, heldout))
    for part in ("english", "docstrings", "code"):
        for row in read_rows(str(data / "pretrain" / f"{part}.jsonl")):
            assert shared.isdisjoint(tool.passages(text_of(row))), row.where


def test_the_leak_check_would_see_a_leak(data: Path) -> None:
    figures = json.loads((data / "summary.json").read_text())["heldout_xz"]
    assert 2.0 < figures["bits_per_byte_alone"] < 3.0
    assert 1.4 < figures["bits_per_byte_after_training_text"] < figures["bits_per_byte_alone"]
    text = rows(data, "pretrain/heldout")[0]["text"] + rows(data, "pretrain/heldout")[1]["text"]
    assert (
        tool.xz_bits_per_byte({"english": {"a": text}, "heldout": {"a": text}})["bits_per_byte_after_training_text"]
        < 0.3
    )


def test_pages_of_ruff_are_not_in_the_pre_training_text(data: Path) -> None:
    texts = [row["text"] for part in ("english", "docstrings", "code") for row in rows(data, f"pretrain/{part}")]
    answers = [row["messages"][1]["content"] for row in rows(data, "sft/heldout")]
    assert not [answer for answer in answers if len(answer) > 60 and any(answer in text for text in texts)]


def test_sft_dpo_and_code_hold_out_the_same_tenth_of_the_rules(data: Path) -> None:
    def rules(side: str) -> set[str]:
        return {row["rule"] for part in ("sft", "dpo", "code") for row in rows(data, f"{part}/{side}")}

    assert not rules("train") & rules("heldout")
    assert 0.05 < len(rules("heldout")) / len(rules("train")) < 0.2


def test_code_of_held_out_rules_shares_no_passage_with_training_code(data: Path) -> None:
    def passages(side: str) -> set[tuple[str, ...]]:
        answers = (row[answer][0] for row in rows(data, f"code/{side}") for answer in ("chosen", "rejected"))
        return set().union(*(tool.passages(answer["content"]) for answer in answers))

    assert passages("train").isdisjoint(passages("heldout"))


def test_good_code_is_chosen_over_the_example(data: Path) -> None:
    pairs = {row["rule"]: row for name in ("train", "heldout") for row in rows(data, f"code/{name}")}
    pair = pairs["none-comparison"]
    assert "arg != None" in pair["rejected"][0]["content"]
    assert "arg is not None" in pair["chosen"][0]["content"]


def test_answers_of_held_out_rules_share_no_passage_with_training_answers(data: Path) -> None:
    train = set().union(*(tool.passages(row["messages"][1]["content"]) for row in rows(data, "sft/train")))
    for row in rows(data, "sft/heldout"):
        assert train.isdisjoint(tool.passages(row["messages"][1]["content"])), row["rule"]


def test_rows_are_read_and_fit_into_the_context(data: Path) -> None:
    tokenizer = Tokenizer.from_folder(data / "tokenizer")
    assert tokenizer.vocab_size == 1024
    lengths = [len(encode_chat(messages_of(row), tokenizer).input_ids) for row in read_rows(str(data / "sft"))]
    assert max(lengths) <= 512
    for row in read_rows([str(data / "dpo"), str(data / "code")]):
        pair = pair_of(row)
        for answer in (pair.chosen, pair.rejected):
            assert len(encode_chat([*pair.prompt, *answer], tokenizer).input_ids) <= 512


def test_pairs_prefer_the_answer_to_the_question(data: Path) -> None:
    for name in ("train", "heldout"):
        said = {row["rule"]: row for row in rows(data, f"dpo/{name}")}
        chats = {(row["rule"], row["messages"][1]["content"]): row["messages"][0] for row in rows(data, f"sft/{name}")}
        for rule, pair in said.items():
            assert chats[rule, pair["chosen"][0]["content"]] == pair["prompt"][0]
            assert chats.get((rule, pair["rejected"][0]["content"])) != pair["prompt"][0]


# ---- how it is written ----


def test_a_second_run_does_nothing_and_another_vocabulary_everything(data: Path) -> None:
    before = (data / "summary.json").stat().st_mtime_ns
    assert run("--out", data, "--vocab-size", 1024).stdout == f"{data} is up to date\n"
    assert (data / "summary.json").stat().st_mtime_ns == before
    assert not tool.is_current(data, tool.version_key(2048))


@pytest.mark.slow
def test_it_is_deterministic(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "xz_size", len)  # the slow part, which goes into no file that is compared
    tool.build(tmp_path, 1024)
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 12
    assert all((tmp_path / file).read_bytes() == (data / file).read_bytes() for file in files)


@pytest.mark.parametrize(("size", "message"), [(1000, "multiple of 128"), (256, "at least 384")])
def test_bad_vocabulary_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, message: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--out", str(tmp_path / "data"), "--vocab-size", str(size)])
    with pytest.raises(UserError, match=message):
        tool.main()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run("--out", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "files that this tool did not write" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- the parts ----

LONG = "one two three four five six seven eight nine ten"


def test_passages_see_through_case_punctuation_and_line_breaks() -> None:
    assert tool.passages("One, two; three\nfour FIVE (six) seven eight!") == {tuple(LONG.split()[:8])}
    assert tool.passages("one two three four five six seven") == set()


def test_families_are_transitive() -> None:
    texts = {"a": LONG, "b": f"{LONG} and then a b c d e f g h", "c": "then a b c d e f g h", "d": "quite another text"}
    assert sorted(sorted(names) for names in tool.families(texts)) == [["a", "b", "c"], ["d"]]


def test_holding_out_takes_whole_families_but_not_the_largest() -> None:
    texts = {"a": LONG, "b": LONG, "big": "x " * 100, "c": "short", "d": "shorter"}
    for enough in (1, 10, 1000):
        chosen = tool.hold_out(texts, enough)
        assert "big" not in chosen
        assert ("a" in chosen) == ("b" in chosen)
    assert tool.hold_out(texts, 1000) == {"a", "b", "c", "d"}


def test_docstrings_read_like_help() -> None:
    source = (
        '"""Module."""\nclass A:\n    """Class."""\n'
        '    def f(self, x=1):\n        """First.\n\n        More.\n        """\n\ndef g(): pass\n'
    )
    assert tool.docstrings(source) == "Module.\n\nA\n\n   Class.\n\nA.f(self, x=1)\n\n   First.\n\n   More."
