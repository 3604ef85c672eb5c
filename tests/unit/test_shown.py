"""Foreign text on a terminal and in logs: control characters are escapes."""

import io
import logging

from bitnet_train.errors import PrintableFormatter, shown

HOSTILE = "a\x1b[31mb\x07\x9b2J\u202ec\td\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_escapes_and_a_pipe_what_was_written() -> None:
    assert shown(HOSTILE, Terminal()) == "a\\x1b[31mb\\x07\\x9b2J\\u202ec\td\n"
    assert shown(HOSTILE, io.StringIO()) == HOSTILE


def test_a_log_shows_control_characters_as_escapes() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "read %s", (HOSTILE,), None)
    assert PrintableFormatter("%(message)s").format(record) == "read " + shown(HOSTILE, Terminal())
