"""How a command ends: exit codes, one line, and an output that takes no more."""

import io
import os
from collections.abc import Callable

import pytest

from bitnet_train.errors import UserError, printable, run_command


def ended(main: Callable[[], int | None]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        run_command(main)
    return end.value.code


def fail(error: Exception) -> None:
    raise error


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: None) == 0
    assert ended(lambda: 85) == 85
    assert capsys.readouterr() == ("", "")
    assert ended(lambda: fail(UserError("wrong\n  \x1b[31mfile"))) == 2
    assert capsys.readouterr() == ("", "error: wrong \\x1b[31mfile\n")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")])
def test_what_is_not_of_standard_output_is_raised(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk or a pipe to another process, while the output is fine and stays as it is."""
    with pytest.raises(type(error)):
        run_command(lambda: fail(error))
    assert capsys.readouterr() == ("", "")


def test_standard_output_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    assert ended(lambda: print("a")) == 0
    assert stream.getvalue() == "a\n"
    assert (stream.write, stream.flush) == (io.StringIO.write.__get__(stream), io.StringIO.flush.__get__(stream))


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes of a descriptor the standard output."""

    def set_to(descriptor: int) -> None:
        monkeypatch.setattr("sys.stdout", os.fdopen(descriptor, "w"))

    return set_to


@pytest.mark.parametrize("size", [1, 100_000])  # within and beyond the buffer
def test_a_full_disk_is_one_line(size: int, output: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    output(os.open("/dev/full", os.O_WRONLY))
    assert ended(lambda: print("x" * size)) == 2
    message = "error: standard output cannot be written (No space left on device); make room or write elsewhere\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_closed_pipe_ends_the_command_silently(
    size: int, output: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    output(writer)
    os.close(reader)
    assert ended(lambda: print("x" * size)) == 141
    assert capsys.readouterr().err == ""


def test_without_standard_output_a_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert ended(lambda: print("unseen")) == 0


@pytest.mark.parametrize(
    ("text", "shown"), [("a\x1b]0;b\x07", "a\\x1b]0;b\\x07"), ("\udcff", "\\udcff"), ("ß\t", "ß\t")]
)
def test_foreign_text_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
