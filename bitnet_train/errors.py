"""What a user got wrong, said in one line.

A command ends with exit code 0 (done), 2 (the user's configuration or data is wrong: one line, no traceback) or
anything else (a failure: the traceback; silently with 141 where nobody reads the output any more, as in `| head`).
`UserError` is how any part of the package asks for code 2, and `RunFailed` how a run ends with code 1 where the cause
is known and one line says it.
"""

import argparse
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE


class UserError(ValueError):
    """A wrong configuration, file or row; the message names it, the rule, the value and the remedy."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises what its worker raised with the traceback as the message; it ends in what was said.
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip("\n"))


@contextmanager
def within(place: object) -> Iterator[None]:
    """Puts a place, such as a file, in front of a UserError of those who do not know it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


class RunFailed(RuntimeError):
    """A run cannot go on, for a cause that lies outside of the code; the message names the cause and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong option as every other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises the UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


# C0 but for tab and line feed, DEL and C1, the marks that turn the direction of a text, halves of surrogate pairs
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Foreign text for a terminal: what would move the cursor, colour, retitle or hide is written as an escape."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_utf8(text: str) -> bool:
    """Whether a text can be written; Python gives bytes that are no UTF-8 to a program as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def shown(text: str, stream: TextIO) -> str:
    """A model's text for a stream: as it is for a pipe or a file, `printable` for a terminal."""
    return printable(text) if stream.isatty() else text


class PrintableFormatter(logging.Formatter):
    """Writes control characters in the records of a log, which quote foreign text, as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        return printable(super().format(record))


def report(error: object) -> None:
    """The one line, on standard error."""
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command-line entry point and turns its outcome into an exit code (see the module's text)."""
    failures: list[OSError] = []
    try:
        with _noting_failures(sys.stdout, failures):
            code = main() or 0
            if sys.stdout is not None:
                sys.stdout.flush()
    except UserError as error:
        report(error)
        code = EXIT_USER_ERROR
    except OSError as error:
        if error not in failures:
            raise
        code = _without_output(error)
    sys.exit(code)


@contextmanager
def _noting_failures(stream: TextIO | None, failures: list[OSError]) -> Iterator[None]:
    """Collects the errors of writing to a stream: nothing else tells them from those of other files."""
    methods = {name: getattr(stream, name) for name in ("write", "flush")} if stream is not None else {}
    for name, method in methods.items():
        setattr(stream, name, _noting(method, failures))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(stream, name, method)


def _noting(method: Callable[..., object], failures: list[OSError]) -> Callable[..., object]:
    def noted(*args: object) -> object:
        try:
            return method(*args)
        except OSError as error:
            failures.append(error)
            raise

    return noted


def _without_output(error: OSError) -> int:
    """The exit code where standard output takes no more: of a closed pipe, silently, that of a program it killed."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what is left is written when Python ends
    if error.errno == errno.EPIPE:
        return EXIT_CLOSED_PIPE
    report(UserError(f"standard output cannot be written ({error.strerror}); make room or write elsewhere"))
    return EXIT_USER_ERROR
