"""Types of command-line options: what a number must be is said where it is parsed, before any work is done.

parser.add_argument("--limit", type=integer(1))
parser.add_argument("--keep", type=number(0))
"""

import argparse
import math
import sys
from collections.abc import Callable

from bitnet_train.errors import is_utf8

INT64 = 2**63 - 1
_SHOWN = 50  # characters of a value in a message


def integer(minimum: int, maximum: int = INT64) -> Callable[[str], int]:
    """Parses a whole number from minimum to maximum."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _error("an integer", text) from None
        return int(_bounded(value, minimum, maximum, text))

    return parse


def number(minimum: float, maximum: float = sys.float_info.max) -> Callable[[str], float]:
    """Parses a finite number from minimum to maximum."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _error("a number", text) from None
        if not math.isfinite(value):
            raise _error("finite", text)
        return _bounded(value, minimum, maximum, text)

    return parse


def seed(text: str) -> int:
    """Parses what torch takes for a seed: any 64 bits, with or without a sign."""
    return integer(-INT64 - 1, 2 * INT64 + 1)(text)


def text(value: str) -> str:
    """A text as it stands; the bytes of an argument that are no UTF-8 are refused."""
    if not is_utf8(value):
        raise _error("UTF-8", value)
    return value


def _bounded(value: float, minimum: float, maximum: float, text: str) -> float:
    if value < minimum:
        raise _error(f"at least {minimum}", text)
    if value > maximum:
        raise _error(f"at most {maximum}", text)
    return value


def _error(rule: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {rule}, got {text[:_SHOWN]}")
