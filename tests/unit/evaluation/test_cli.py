"""The command: the shape of its JSON object, and what it refuses before a model is loaded."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.evaluation.cli import main
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.export import export
from bitnet_train.model.pretrained import load_for_inference
from tests.support import text_rows, write_jsonl

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bitnet-evaluate ARGUMENTS`: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnet-evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two files of text, in a folder whose name looks like NAME=PATH."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    return [str(write_jsonl(Path(f"lr=1/{name}.jsonl"), text_rows(n))) for name, n in (("a", 3), ("b", 5))]


def test_plain_paths_give_the_five_figures_and_names_an_entry_each(
    run: Run, master: Path, packed: Path, texts: list[str], choices: list[dict[str, object]]
) -> None:
    gguf = master.with_name("model.gguf")
    export(master, gguf, format="gguf", type="i2_s")
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    both, one = evaluate(model, tokenizer, texts), evaluate(model, tokenizer, texts[0])
    code, output, error = run(master, "--data", *texts)
    assert (code, json.loads(output), error) == (0, both, "")
    named = json.loads(run(master, "--data", f"x={texts[0]}", f"y={texts[0]}", f"y={texts[1]}")[1])
    assert named == {"x": one, "y": both}
    assert json.loads(run(master, "--data", f"x={texts[0]}")[1]) == {"x": one}
    task = write_jsonl(Path("mats.jsonl"), choices)
    mixed = json.loads(run(master, "--data", texts[0], f"y={texts[1]}", "--tasks", task, f"again={task}")[1])
    assert list(mixed) == ["data", "y", "mats", "again"]
    assert mixed["data"] == one
    assert mixed["mats"] == mixed["again"]
    for other in (packed, gguf):
        found = json.loads(run(other, "--data", *texts)[1])
        assert found["nll"] == pytest.approx(both["nll"], rel=0.01)
        assert (found["tokens"], found["bytes"]) == (both["tokens"], both["bytes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure; give --data, --tasks or --lm-eval"),
        (["--data", "x=none.jsonl"], "none.jsonl: no such file or folder"),
        (["--tasks", "t.jsonl", "--limit", "3"], "--limit belongs to --lm-eval, got none; leave it out"),
        (["--data", "t.jsonl", "--chat"], "--chat belongs to --tasks and --lm-eval, got none; leave it out"),
        (["--data", "t.jsonl", "--sequence-length", "0"], "argument --sequence-length: must be at least 1, got 0"),
        (["--tasks", "t.jsonl", "--max-new-tokens", "x"], "argument --max-new-tokens: must be an integer, got x"),
        (["--lm-eval", "arc_easy"], "--lm-eval: lm-evaluation-harness is not installed"),
    ],
)
def test_wrong_options_cost_one_line_and_no_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, texts: list[str], options: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where the extra is not installed
    monkeypatch.delitem(sys.modules, "bitnet_train.evaluation.harness", raising=False)
    write_jsonl(Path("t.jsonl"), text_rows(1))
    code, output, error = run("no-model", *options)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"error: {message}")
    assert "arc_easy" not in options or error.endswith("pip install 'bitnet-train[eval]'\n")


def test_two_tasks_of_one_name_are_refused(
    run: Run, master: Path, tmp_path: Path, prompts: list[dict[str, object]]
) -> None:
    task = write_jsonl(tmp_path / "t.jsonl", prompts[:1])
    code, output, error = run(master, "--tasks", task, task, "--max-new-tokens", "1")
    assert (code, output) == (2, "")
    assert error == "error: two sets or tasks are called 't'; name one of them: NAME=PATH\n"
