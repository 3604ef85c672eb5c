"""The command: prompts, files of prompts, and a chat over a pipe and in a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import printable
from bitnet_train.generate import ChatSession, Sampling, complete
from bitnet_train.generate.cli import main
from bitnet_train.generate.terminal import GREETING, PROMPT, chat
from bitnet_train.model.pretrained import load_for_inference
from tests.folders import write_master
from tests.support import ROOT, environment, tiny_tokenizer, write_jsonl

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_master(folder, {"max_position_embeddings": 256})
    return folder


@pytest.fixture
def run(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bitnet-generate MODEL OPTIONS` with standard input: exit code, standard output, standard error."""

    def run(*options: str, stdin: str | io.TextIOBase | None = "") -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnet-generate", str(model), "--max-new-tokens", "8", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def expected(model: Path) -> Callable[..., str]:
    """What the model says, by way of `complete`."""
    decoder, tokenizer = load_for_inference(model), Tokenizer.from_folder(model)
    return lambda prompt, chat, seed=0, **how: complete(decoder, tokenizer, prompt, chat, 8, Sampling(**how), seed)


def test_a_prompt(run: Run, expected: Callable[..., str]) -> None:
    assert run("--prompt", "small cat") == (0, expected("small cat", False) + "\n", "")
    sampled = run("--prompt", "small cat", "--chat", "--temperature", "1", "--top-p", "0.9", "--seed", "3")
    assert sampled == (0, expected("small cat", True, temperature=1.0, top_p=0.9, seed=3) + "\n", "")
    assert (
        run("--prompt", "small cat", "--chat", "--system", "be small")[1] != run("--prompt", "small cat", "--chat")[1]
    )


def test_a_file_of_prompts_gives_a_completion_for_each(run: Run, expected: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "small mat"}, {"id": 8, "prompt": "the ßmall cat"}]
    code, output, _ = run("--prompts", str(write_jsonl(tmp_path / "p.jsonl", rows)), "--temperature", "1")
    completed = [{**row, "completion": expected(row["prompt"], False, temperature=1.0)} for row in rows]
    assert (code, [json.loads(line) for line in output.splitlines()]) == (0, completed)
    (tmp_path / "p.txt").write_text("small mat\n\nthe ßmall cat\n")
    lines = [json.loads(line) for line in run("--prompts", str(tmp_path / "p.txt"), "--chat")[1].splitlines()]
    assert lines == [{"prompt": row["prompt"], "completion": expected(row["prompt"], True)} for row in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "prompt must be a string, got null"),
        ({"prompt": "small " * 300}, "the context 256; shorten it"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_generated(
    run: Run, tmp_path: Path, row: dict[str, object], message: str
) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, row])
    code, output, error = run("--prompts", str(file))
    assert (code, output) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(str(file))}:2: .*{message}\n", error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to generate from; give --prompt TEXT, --prompts FILE or --chat"),
        (["--prompt", "a", "--prompts", "b"], "--prompt and --prompts exclude each other"),
        (["--prompt", "a", "--system", "b"], "--system belongs to --chat"),
        (["--prompt", "a", "--top-p", "0"], "top_p must lie in (0, 1], got 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "argument --temperature: must be at least 0, got -1"),
        (["--prompt", "a", "--temperature", "nan"], "argument --temperature: must be finite, got nan"),
        (["--prompt", "a", "--max-new-tokens", "0"], "argument --max-new-tokens: must be at least 1, got 0"),
        (["--prompt", "a", "--seed", "x"], "argument --seed: must be an integer, got x"),
        (["--prompt", "a", "--seed", "9" * 20], f"argument --seed: must be at most {2**64 - 1}, got 99999"),
        (["--prompt", "a\udcff"], "argument --prompt: must be UTF-8, got a\\udcff"),
        (["--chat", "--system", "\udcff"], "argument --system: must be UTF-8, got \\udcff"),
    ],
)
def test_wrong_options_cost_one_line(run: Run, options: list[str], message: str) -> None:
    code, output, error = run(*options)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"error: {message}")


def test_a_chat_over_a_pipe_prints_the_answers_alone(run: Run, expected: Callable[..., str]) -> None:
    said = "small cat\n/reset\n\nsmall mat\n" + "small " * 300 + "\n/exit\nnever read\n"
    code, output, error = run("--chat", stdin=said)
    assert (code, output) == (0, f"{expected('small cat', True)}\n{expected('small mat', True)}\n")
    assert re.fullmatch(r"error: the prompt has \d+ tokens, the context 256; shorten it\n", error)
    second = run("--chat", stdin="small cat\nsmall mat\n")[1]
    assert second.startswith(f"{expected('small cat', True)}\n")
    assert second != output  # the second question was asked with the first in mind


def test_ctrl_c_stops_an_answer_and_then_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one", "two"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    def stopped(ids: list[int]) -> Iterator[str]:
        yield "wi"
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    session = ChatSession(tiny_tokenizer(), stopped, 90, system=None)
    chat(session)
    assert capsys.readouterr().out == "wi\nwi\n"
    assert [message["content"] for message in session.turns] == ["one", "wi", "two", "wi"]


@pytest.mark.parametrize("said", [b"\xff\n", b"caf\xe9\n"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # Python's, and its own in the C locale
def test_a_message_that_is_no_text_is_one_line(run: Run, said: bytes, errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(said), "utf-8", errors)
    code, output, error = run("--chat", stdin=stdin)
    assert (code, output, error.count("\n")) == (2 if errors == "strict" else 0, "", 1)
    assert re.match("error: (standard input is not UTF-8|the message holds NUL bytes or lone surrogates)", error)


def test_a_chat_without_standard_input_is_one_line(run: Run, tmp_path: Path) -> None:
    assert run("--chat", stdin=None)[::2] == (
        2, "error: a chat reads standard input, which is closed; open it, or give --prompt TEXT\n"
    )  # fmt: skip
    with (tmp_path / "out").open("w") as written:
        error = run("--chat", stdin=written)[2]
    assert error == "error: standard input cannot be read; give one that can, or --prompt TEXT\n"


def test_an_output_that_nobody_reads_ends_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        assert run("--prompt", "small cat")[::2] == (141, "")


def test_an_output_without_room_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        code, _, error = run("--chat", stdin="small cat\n")
    message = "error: standard output cannot be written (No space left on device); make room or write elsewhere\n"
    assert (code, error) == (2, message)


def read_until(terminal: int, text: str) -> str:
    """What the program prints, up to and with the text."""
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], 200)[0], seen
        seen += os.read(terminal, 1024).decode(errors="replace")
    return seen


def test_a_chat_in_a_terminal_ends_with_ctrl_c(model: Path, expected: Callable[..., str]) -> None:
    """The terminal is a real one to the program: it echoes, and turns \\x03 into a signal."""
    command = [sys.executable, "tools/generate.py", str(model), "--chat", "--max-new-tokens", "8"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it, and hands that on
        os.execve(sys.executable, command, environment() | {"TERM": "dumb"})
    assert GREETING in read_until(terminal, PROMPT)
    os.write(terminal, b"small cat\n")
    seen = read_until(terminal, f"\n{PROMPT}").replace("\r\n", "\n")
    assert seen.endswith(f"small cat\n{printable(expected('small cat', True))}\n{PROMPT}")
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)


def test_a_prompt_ends_at_a_line_feed_alone(run: Run, tmp_path: Path) -> None:
    """Form feeds, separators of Unicode and carriage returns within a line are parts of a prompt."""
    prompts = ["one\u2028two", "three\x0cfour", "five\x85six", "se\rven"]
    (tmp_path / "p.txt").write_bytes("\r\n".join([*prompts, "", " "]).encode())
    lines = run("--prompts", str(tmp_path / "p.txt"))[1].split("\n")
    assert [json.loads(line)["prompt"] for line in lines if line] == prompts
