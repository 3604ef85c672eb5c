"""A large tensor by blocks of rows: read, cast, written and compared without being whole in memory.

A part is a call that makes some rows. Several threads make the next parts while one is used, so that reading, rounding
and writing go on beside each other; each of them computes by itself, for torch's own division of every operation would
have them wait for one another.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from bitnet_train.errors import UserError

_VALUES = 1 << 22
_MOST_WORKERS = 4  # each holds a matrix

Item = TypeVar("Item")


def nothing(path: Path, name: str = "") -> None:
    """Takes note of no tensor that was written, and looks at no file."""


def row_slices(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a tensor in blocks of about four million values, the same for every dtype."""
    step = max(1, _VALUES // max(1, prod(shape[1:])))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def read_bytes(path: Path, start: int, stop: int) -> np.ndarray:
    """Bytes of a file, uint8 `(stop - start,)`. Read, not mapped: a map costs a fault per page, and stays resident.

    Raises:
        UserError: the file ends before `stop`.
    """
    data = np.empty(stop - start, dtype=np.uint8)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(data.data) != len(data):
            raise UserError(f"{path}: must have {stop} bytes, got {path.stat().st_size}; copy it again")
    return data


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses and one that waits for the disk; what they have not begun is dropped."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads + 1, _MOST_WORKERS), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def ahead(calls: Iterable[Callable[[], Item]]) -> Iterator[Item]:
    """The results of the calls in order, the next few of them made by `workers` while one is used."""
    remaining = iter(calls)
    with workers() as pool:
        upcoming = deque(pool.submit(call) for call in islice(remaining, _MOST_WORKERS - 1))
        while upcoming:
            item = upcoming.popleft().result()
            upcoming.extend(pool.submit(call) for call in islice(remaining, 1))
            yield item
