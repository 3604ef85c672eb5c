"""metrics.jsonl as a killed run, a network file system and strangers leave it."""

from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.formats.metrics import METRICS, event_lines, read_events

GOOD = b'{"step": 1, "tokens": 64, "train/loss": 5.5}\n'
TORN = {
    "cut": b'{"step": 2, "train/lo',
    "zeros": b"\0" * 40,
    "not UTF-8": b'{"step": 2, "\xff": 1}\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "no step": b'{"train/loss": 1.0}\n',
    "a step of text": b'{"step": "2", "train/loss": 1.0}\n',
    "a step without end": b'{"step": Infinity, "train/loss": 1.0}\n',
    "a huge step": b'{"step": 1' + b"0" * 400 + b"}\n",
    "too many digits": b'{"step": 1' + b"0" * 10_000 + b"}\n",
    "nested deeply": b'{"step": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "an empty line": b"\n",
}


@pytest.mark.parametrize("name", TORN)
def test_a_line_that_holds_no_event_is_left_out_and_told(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / METRICS).write_bytes(GOOD + TORN[name])
    assert read_events(tmp_path) == [{"step": 1, "tokens": 64, "train/loss": 5.5}]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / METRICS}: 1 of 2 lines hold no log event and are left out, the first is line 2"
    ]


@pytest.mark.parametrize("value", ['"x"', "null", "[1]", "true", '{"a": 1}', "1" + "0" * 400])
def test_a_value_that_is_no_number_is_left_out(tmp_path: Path, value: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS).write_text(f'{{"step": 1, "train/loss": {value}, "train/lr": 0.5}}\n')
    assert read_events(tmp_path) == [{"step": 1, "train/lr": 0.5}]
    assert not caplog.records


def test_lines_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(GOOD + TORN["cut"])
    assert [line for line, _ in event_lines(tmp_path / METRICS)] == [GOOD, TORN["cut"]]


def test_no_log_has_no_events_and_one_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    (tmp_path / METRICS).mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(Is a directory\)"):
        read_events(tmp_path)
