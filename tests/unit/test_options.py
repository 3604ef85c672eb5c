"""Types of options: what is no number of the wanted kind is said in one line."""

import pytest

from bitnet_train.errors import ArgumentParser, UserError
from bitnet_train.options import integer, number, seed, text


def parsed(kind: object, value: str) -> object:
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--option", type=kind)  # type: ignore[arg-type]
    return parser.parse_args([f"--option={value}"]).option


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (integer(1), "1", 1),
        (integer(0), "9223372036854775807", 2**63 - 1),
        (number(0), "1e-320", 1e-320),
        (number(0, 1), "1", 1.0),
        (seed, "-9223372036854775808", -(2**63)),
        (seed, "18446744073709551615", 2**64 - 1),
        (text, "ßmall\ttext", "ßmall\ttext"),
        (text, "", ""),
    ],
)
def test_what_fits_is_taken(kind: object, value: str, expected: object) -> None:
    assert parsed(kind, value) == expected


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (integer(1), "0", "must be at least 1, got 0"),
        (integer(1), "1.5", "must be an integer, got 1.5"),
        (integer(1), "9" * 30, f"must be at most {2**63 - 1}, got {'9' * 30}"),
        (integer(1), "9" * 5000, f"must be an integer, got {'9' * 50}"),  # beyond what Python parses
        (integer(1, 5), "6", "must be at most 5, got 6"),
        (number(0), "nan", "must be finite, got nan"),
        (number(0), "inf", "must be finite, got inf"),
        (number(0), "1e999", "must be finite, got 1e999"),
        (number(0), "-1", "must be at least 0, got -1"),
        (number(0), "much", "must be a number, got much"),
        (number(0, 1e9), "1e300", "must be at most 1000000000.0, got 1e300"),
        (seed, "18446744073709551616", f"must be at most {2**64 - 1}, got {2**64}"),
        (text, "a\udcff", "must be UTF-8, got a\udcff"),
        (text, "\ud800", "must be UTF-8, got \ud800"),
    ],
)
def test_what_does_not_fit_is_one_line(kind: object, value: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(kind, value)
    assert str(caught.value) == f"argument --option: {message}; see tool --help"
