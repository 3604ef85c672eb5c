"""Rows of files, one at a time.

    file | glob | folder | hub id  ->  `paths.expand`  ->  files in sorted order  ->  Row(file, number, fields)

What cannot be read raises a UserError that names the file and the row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitnet_train.data.hub import is_hub_id, read_hub
from bitnet_train.data.parts import Cut
from bitnet_train.data.paths import expand
from bitnet_train.data.readers import START, Fields, Place, Placed
from bitnet_train.data.readers import read_from as read_file_from
from bitnet_train.data.saved import is_saved, read_saved
from bitnet_train.errors import UserError, within


@dataclass(frozen=True)
class Row:
    """One row of a file, or a part of one; `number` counts lines or rows from 1."""

    file: str
    number: int
    fields: Fields
    begins: bool = True
    ends: bool = True

    @property
    def where(self) -> str:
        """file:number, as messages name it."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class BadRow:
    """A row that is no row; `error` says why, the file and the number included."""

    error: UserError
    ends: bool = True


def located(row: Row) -> AbstractContextManager[None]:
    """Puts the file and the number of the row in front of a UserError from the block."""
    return within(row.where)


def read_rows(paths: str | Sequence[str], cut: Cut | None = None) -> Iterator[Row]:
    """Streams the rows of all files that the paths name, in the order of `expand`; `readers` lists the formats.

    Args:
        cut: where to cut a long text into parts, see `data.parts`; None: every row is whole.

    Raises:
        UserError: what `expand` raises, at once; while reading, what `scan_rows` raises and the error of a bad row.
    """
    return map(_good, scan_rows(expand(paths), cut=cut))


def _good(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise row.error
    return row


def scan_rows(
    files: Sequence[str], on_read: Callable[[int], object] = int, cut: Cut | None = None
) -> Iterator[Row | BadRow]:
    """Streams the rows of files and hub ids, bad ones included.

    Args:
        on_read: is told how many bytes of a file were read, each time.
        cut: as for `read_rows`.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    return (row for file in files for _, row in _rows_from(file, START, on_read, cut))


def _rows_from(
    file: str, start: Place, on_read: Callable[[int], object], cut: Cut | None
) -> Iterator[tuple[Place, Row | BadRow]]:
    """The rows from a place on, each with the place behind it."""
    before = start
    for end, content in _read_from(file, start, on_read, cut):
        yield end, _row_of(file, before, end, content)
        before = end
    if before == START:
        raise no_rows(file)


def _read_from(file: str, start: Place, on_read: Callable[[int], object], cut: Cut | None) -> Placed:
    """The rows of a file, a saved data set or a hub id from a place on; the hub has one place alone, its start."""
    if is_hub_id(file):
        return read_hub(file, cut)
    read = read_saved if is_saved(Path(file)) else read_file_from
    return read(file, start, on_read, cut)


def characters_of(value: object) -> int:
    """Characters of a row or of a value in it; what is no text counts for eight."""
    if isinstance(value, Row):
        return characters_of(value.fields)
    if isinstance(value, dict):
        return sum(map(characters_of, value.values()))
    if isinstance(value, list):
        return sum(map(characters_of, value))
    return len(value) if isinstance(value, str) else 8


class Block(NamedTuple):
    """Consecutive rows, or parts of them, of a file; reading it again begins at `start`, reading on at `end`."""

    start: Place
    end: Place
    rows: list[Row | BadRow]


def read_blocks(
    file: str, start: Place, characters: int, on_read: Callable[[int], object] = int, cut: Cut | None = None
) -> Iterator[Block]:
    """Streams a file from a place on in blocks of rows, each of at least so many characters but for the last.

    From the start of any block on the blocks are the same.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    rows: list[Row | BadRow] = []
    size, first, end = 0, start, start
    for end, row in _rows_from(file, start, on_read, cut):
        rows.append(row)
        size += characters_of(row)
        if size >= characters:
            yield Block(first, end, rows)
            rows, size, first = [], 0, end
    if rows:
        yield Block(first, end, rows)


def _row_of(file: str, start: Place, end: Place, content: Fields | UserError) -> Row | BadRow:
    """A row, or a part of one, that a reader found between two places."""
    number = end.number + bool(end.inside)
    if isinstance(content, UserError):
        return BadRow(UserError(f"{file}:{number}: {content}"))
    return Row(file, number, content, begins=not start.inside, ends=not end.inside)


def no_rows(file: str) -> UserError:
    """What is said of a file without rows."""
    return UserError(f"{file}: the file holds no rows; fill it or take it out of the data paths")
