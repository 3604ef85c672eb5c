"""A chat in the terminal: a line is a message, /reset forgets, /exit, Ctrl-D or Ctrl-C ends; Ctrl-C stops an answer."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import closing

from bitnet_train.errors import UserError, report, shown
from bitnet_train.generate.session import ChatSession

PROMPT = "> "
GREETING = "/reset forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def chat(session: ChatSession) -> None:
    """Reads messages from standard input until its end and writes answers to standard output as they come.

    Prompt and greeting are for a terminal only; a message that cannot be answered costs one line on standard error.
    """
    if sys.stdin is None:
        raise UserError("a chat reads standard input, which is closed; open it, or give --prompt TEXT")
    interactive = sys.stdin.isatty()
    if interactive:
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives `input` history and editing
        print(GREETING, file=sys.stderr)
    for message in _messages(PROMPT if interactive else ""):
        if message == "/reset":
            session.reset()
        elif message:
            _answer(session, message)


def _messages(prompt: str) -> Iterator[str]:
    """The lines of standard input until /exit, Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()  # the shell's own prompt begins a line
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error}); set the terminal to UTF-8") from None
        except OSError:
            if not sys.stdin.readable():
                raise UserError("standard input cannot be read; give one that can, or --prompt TEXT") from None
            raise
        if line == "/exit":
            return
        yield line


def _answer(session: ChatSession, message: str) -> None:
    try:
        with closing(session.say(message)) as pieces:
            for piece in pieces:
                print(shown(piece, sys.stdout), end="", flush=True)
    except UserError as error:
        report(error)
        return
    except KeyboardInterrupt:
        pass  # what came stays in the conversation
    print(flush=True)
