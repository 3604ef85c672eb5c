"""Rows of files, one at a time.

    file | glob | folder | hub id  ->  `paths.expand`  ->  files in sorted order  ->  Row(file, number, fields)

What cannot be read raises a UserError that names the file and the row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitnet_train.data.hub import is_hub_id, read_hub
from bitnet_train.data.paths import expand
from bitnet_train.data.readers import START, Fields, Place, Placed
from bitnet_train.data.readers import read_from as read_file_from
from bitnet_train.data.saved import is_saved, read_saved
from bitnet_train.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a file; `number` counts lines or rows from 1."""

    file: str
    number: int
    fields: Fields

    @property
    def where(self) -> str:
        """file:number, as messages name it."""
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class BadRow:
    """A row that is no row; `error` says why, the file and the number included."""

    error: UserError


@contextmanager
def located(row: Row) -> Iterator[None]:
    """Puts the file and the number of the row in front of a UserError from the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def read_rows(paths: str | Sequence[str]) -> Iterator[Row]:
    """Streams the rows of all files that the paths name, in the order of `expand`; `readers` lists the formats.

    Raises:
        UserError: what `expand` raises, at once; while reading, what `scan_rows` raises and the error of a bad row.
    """
    return map(_good, scan_rows(expand(paths)))


def _good(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise row.error
    return row


def scan_rows(files: Sequence[str], on_read: Callable[[int], object] = int) -> Iterator[Row | BadRow]:
    """Streams the rows of files and hub ids, bad ones included.

    Args:
        on_read: is told how many bytes of a file were read, each time.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    return (row for file in files for row in _rows_of(file, on_read))


def _rows_of(file: str, on_read: Callable[[int], object]) -> Iterator[Row | BadRow]:
    empty = True
    for place, content in _read_from(file, START, on_read):
        empty = False
        yield row_of(file, place.number, content)
    if empty:
        raise no_rows(file)


def _read_from(file: str, start: Place, on_read: Callable[[int], object]) -> Placed:
    """The rows of a file, a saved data set or a hub id from a place on; the hub has one place alone, its start."""
    if is_hub_id(file):
        return read_hub(file)
    return read_saved(file, start, on_read) if is_saved(Path(file)) else read_file_from(file, start, on_read)


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
    """Consecutive rows of a file; reading it again begins at `start`, reading on at `end`."""

    start: Place
    end: Place
    rows: list[Row | BadRow]


def read_blocks(file: str, start: Place, characters: int, on_read: Callable[[int], object] = int) -> Iterator[Block]:
    """Streams a file from a place on in blocks of whole rows, each of at least so many characters but for the last.

    From the start of any block on the blocks are the same.

    Raises:
        UserError: a damaged file, a file without rows.
    """
    rows: list[Row | BadRow] = []
    size, first, end = 0, start, start
    for end, content in _read_from(file, start, on_read):
        rows.append(row_of(file, end.number, content))
        size += characters_of(content)
        if size >= characters:
            yield Block(first, end, rows)
            rows, size, first = [], 0, end
    if rows:
        yield Block(first, end, rows)
    elif end == START:
        raise no_rows(file)


def row_of(file: str, number: int, content: Fields | UserError) -> Row | BadRow:
    """A row as `readers` gives it."""
    if isinstance(content, UserError):
        return BadRow(UserError(f"{file}:{number}: {content}"))
    return Row(file, number, content)


def no_rows(file: str) -> UserError:
    """What is said of a file without rows."""
    return UserError(f"{file}: the file holds no rows; fill it or take it out of the data paths")
