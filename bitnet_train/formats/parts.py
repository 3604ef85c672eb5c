"""A large tensor by blocks of rows: read, cast, written and compared without being whole in memory."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TypeVar

_VALUES = 1 << 22
_END = object()

Item = TypeVar("Item")


def rows_per_part(shape: tuple[int, ...]) -> int:
    """How many rows make a block of about four million values; the same for every dtype."""
    return max(1, _VALUES // max(1, prod(shape[1:])))


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, each made by a thread while the one before is used: reading and rounding beside writing."""
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, iterator, _END)
        while (item := upcoming.result()) is not _END:
            upcoming = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]  # it is not _END
