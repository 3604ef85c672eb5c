"""The bounds on a YAML text that somebody else may have written, before it is expanded.

An alias stands for all that its anchor holds: nine lines of ten aliases each are a billion values. `check_yaml` counts
what the text would become from the parser's events, which take memory for the text alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bitnet_train.errors import UserError

MAX_BYTES = 1 << 20  # a recipe has some thousands
MAX_VALUES = 100_000
_CHARACTERS = 64  # of a text that count as one more value
MAX_DEPTH = 50  # levels: OmegaConf ends in a RecursionError before the 100 of JSON


@dataclass
class _Opened:
    """A list or mapping that is not closed yet: its anchor, the values before it, the levels in it so far."""

    anchor: str | None
    before: int
    levels: int = 0


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(path: Path, text: str) -> None:
    """Refuses what is no YAML, and what is too large when its aliases are expanded.

    Raises:
        UserError: the message names the file, and the line if there is one.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{path}: must have at most {MAX_BYTES:,} characters, got {len(text):,}; shorten it")
    try:
        for values, depth in _sizes(yaml.parse(text, Loader=_Loader)):
            if values > MAX_VALUES or depth > MAX_DEPTH:
                raise UserError(
                    f"{path}: must hold at most {MAX_VALUES:,} values with its aliases expanded, on at most "
                    f"{MAX_DEPTH} levels; shorten it"
                )
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {yaml_fault(error)}") from None


def yaml_fault(error: yaml.YAMLError) -> str:
    """The fault of a YAML text, with its line, in words."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}must be YAML: {problem or error}; mend the file"


def _sizes(events: Iterator[yaml.Event]) -> Iterator[tuple[int, int]]:
    """Values so far with aliases expanded, and the levels of the last one, for every event."""
    anchors: dict[str, tuple[int, int]] = {}  # values and levels of what is anchored and closed
    opened: list[_Opened] = []
    total = 0
    for event in events:
        levels = 0
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Opened(event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            levels = closed.levels + 1
            anchors |= {closed.anchor: (total - closed.before, levels)} if closed.anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            holds_itself = any(event.anchor == outer.anchor for outer in opened)
            values, levels = (MAX_VALUES, 0) if holds_itself else anchors.get(event.anchor, (1, 0))
            total += values
        elif isinstance(event, yaml.ScalarEvent):
            values = 1 + len(event.value) // _CHARACTERS
            total += values
            anchors |= {event.anchor: (values, 0)} if event.anchor else {}
        if opened:
            opened[-1].levels = max(opened[-1].levels, levels)
        yield total, len(opened) + levels
