"""metrics.jsonl, the log of a run: a JSON object per event, {"step": 10, "tokens": 81920, "train/loss": 5.1, ...}.

A kill or a network file system may tear its last line, and others write into it: a line that is no object with a step
is left out, a value that is no number too.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from bitnet_train.errors import UserError

METRICS = "metrics.jsonl"
Event: TypeAlias = dict[str, float]  # "step" and whatever else was logged; integers stay integers

log = logging.getLogger(__name__)

_LARGEST = 2**63  # an integer beyond it is no count of anything, and none beyond 1e308 becomes a float


def read_events(run_dir: Path) -> list[Event]:
    """The log events of a run, none if it has no log; one warning tells of lines that were left out.

    Raises:
        UserError: the file cannot be read.
    """
    events = [event for _, event in event_lines(run_dir / METRICS)]
    torn = [number for number, event in enumerate(events, start=1) if event is None]
    if torn:
        log.warning(
            "%s: %d of %d lines hold no log event and are left out, the first is line %d",
            run_dir / METRICS,
            len(torn),
            len(events),
            torn[0],
        )
    return [event for event in events if event is not None]


def event_lines(file: Path) -> Iterator[tuple[bytes, Event | None]]:
    """Every line of a log as it is stored, and the event that it holds.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            yield from ((line, _event(line)) for line in stream)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


def _event(line: bytes) -> Event | None:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not _is_count(content.get("step")):
        return None
    return {name: value for name, value in content.items() if type(value) is float or _is_count(value)}


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST
