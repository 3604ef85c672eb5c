"""What is said of a runtime's logits; running them is for tests/integration."""

import math
import os
from pathlib import Path

import pytest
import torch

from bitnet_train.export import export
from bitnet_train.export.cli import run
from bitnet_train.export.runtimes import Agreement, Line, Report, Sample, agreement, compare
from bitnet_train.export.tokenization import Compared, Stops, TokenizerCheck


def test_agreement_by_hand() -> None:
    ours = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]).log()
    theirs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]).log() + 7  # logits know no constant
    found = agreement(Sample([0, 1, 0], bytes=4, logits=ours), theirs)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.25 * math.log(1 / 3) + 0.75 * math.log(3)
    assert found.kl == pytest.approx(divergence / 3, abs=1e-6)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.our_bits_per_byte == pytest.approx((2 + 1) / 4)  # p = 1/4 and 1/2 of the labels 1 and 0
    assert found.bits_per_byte == pytest.approx((1 + 1) / 4)
    assert found.perplexity_ratio == pytest.approx(math.sqrt(1 / 2))


def test_a_report_says_what_agrees_and_what_was_not_run() -> None:
    same = Report("transformers", Agreement(1.5e-4, 0.991, 1.2345, 1.2344, 1.0))
    assert same.agrees
    assert same.lines() == [
        Line("transformers: KL 0.00015 nats, top-1 99.1 %, 1.2345 bits per byte, ours 1.2344", agrees=True)
    ]
    other = Report("transformers", Agreement(3.0, 0.1, 9.0, 1.0, 50.0))
    assert not other.agrees
    assert other.lines()[0].text.startswith("transformers: KL 3 nats")
    missing = Report("llama.cpp", None, "not installed")
    assert missing.agrees
    assert missing.lines() == [Line("llama.cpp not run: not installed")]


def test_a_report_tells_of_ids_a_line_each() -> None:
    same = Agreement(1.5e-4, 0.991, 1.2345, 1.2344, 1.0)
    check = TokenizerCheck(
        Compared("prompts", 24, 24, note="12 cut"), Compared("texts", 200, 199, "'a': [1]"), Stops((7,))
    )
    report = Report("transformers", same, tokenizer=check)
    assert report.lines()[1:] == [
        Line("transformers: prompts 24 of 24 equal (12 cut)"),
        Line("transformers: texts 199 of 200 equal, first 'a': [1]", agrees=False),
        Line("transformers: does not stop at 7", agrees=False),
    ]
    assert not report.agrees
    assert str(Stops(alone=(5, 6))) == "stop ids equal, and it stops at 5, 6"
    unread = Report("transformers", same, "it cannot be read")
    assert unread.lines()[1:] == [Line("transformers: prompts and texts not compared: it cannot be read")]


@pytest.mark.parametrize("package", ["transformers", "ik_llama_cpp"])
def test_a_runtime_that_is_not_installed_is_named(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    target, format = (tmp_path / "out", "safetensors") if package == "transformers" else (tmp_path / "a.gguf", "gguf")
    export(master, target, format=format)
    monkeypatch.setattr("bitnet_train.export.llama_process.installed", lambda name: name != package)
    (report,) = compare(master, target)
    assert report.agrees
    assert report.reason == f"{package} is not installed"


def test_another_function_makes_the_command_fail(
    master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitnet_train.export.runtimes.transformers_logits", lambda _, ids: torch.randn(len(ids), 304))
    assert run([str(master), str(tmp_path / "out"), "--format", "safetensors", "--verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: transformers: KL ")
    assert captured.err.endswith(f"; {tmp_path / 'out'} was not kept\n")
    assert os.listdir(tmp_path) == ["master"]


def test_a_text_that_cannot_be_read_is_said(master: Path, tmp_path: Path) -> None:
    export(master, tmp_path / "out")
    (report,) = compare(master, tmp_path / "out", tmp_path / "none.txt")
    assert report.agreement is None
    assert "cannot be read as UTF-8" in report.reason
