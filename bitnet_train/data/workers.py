"""Encoding rows in several processes, in order and with a bounded number of rows in flight.

Rows go out in chunks of about a megabyte of text and come back as arrays. The chunks come back in the order in which
they went out, so that what is written does not depend on the number of processes.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from bitnet_train.data.encoding import Encoded, Encoder
from bitnet_train.data.sources import BadRow, Row, characters_of
from bitnet_train.data.store import BAD_ROWS_NAMED, Counts
from bitnet_train.errors import UserError

_CHUNK_ROWS, _CHUNK_CHARACTERS = 1024, 1 << 20
_IN_FLIGHT = 3  # chunks per process, waiting, at work or done
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Chunk(NamedTuple):
    """The sequences of consecutive rows, joined.

    Attributes:
        ends: int64, where sequences end in `tokens`; what follows the last end goes on in the next chunk.
        tokens: uint32.
        rows: int64, the row of each sequence that ends here, counted from 0.
        counts: of the rows that end here.
    """

    ends: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    counts: Counts


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoded(encoder: Encoder, rows: Iterable[Row | BadRow], processes: int) -> Generator[Chunk, None, None]:
    """Encodes rows in chunks, see `encoded_chunks`."""
    return encoded_chunks(encoder, _chunked(rows), processes)


def encoded_chunks(
    encoder: Encoder, chunks: Iterator[list[Row | BadRow]], processes: int
) -> Generator[Chunk, None, None]:
    """Encodes chunks of rows. One process is this one, where the tokenizer has threads of its own."""
    if processes == 1:
        return (encoded_rows(encoder, chunk) for chunk in chunks)
    return _encoded_by_workers(encoder, chunks, processes)


def _encoded_by_workers(
    encoder: Encoder, chunks: Iterator[list[Row | BadRow]], processes: int
) -> Generator[Chunk, None, None]:
    # fork: the encoder needs no pickling, and a worker does not import torch anew
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder, os.getpid()))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= _IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process


def _start_worker(encoder: Encoder, parent: int) -> None:
    """Keeps the encoder; dies with the parent, and leaves the keyboard's and the scheduler's signals to it."""
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _encode_in_worker(chunk: list[Row | BadRow]) -> Chunk:
    return encoded_rows(_encoder, chunk)


def _chunked(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    chunk: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += characters_of(row)
        last_part = row.ends and isinstance(row, Row) and not row.begins  # then what was made so far can be committed
        if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS or last_part:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encoded_rows(encoder: Encoder, rows: Sequence[Row | BadRow]) -> Chunk:
    """One chunk.

    Raises:
        UserError: a part of a long document cannot be encoded.
    """
    results: list[Encoded] = [row.error if isinstance(row, BadRow) else [] for row in rows]
    good = [(number, row) for number, row in enumerate(rows) if isinstance(row, Row)]
    unread: set[str] = set()
    for (number, row), encoded_row in zip(good, encoder.encode([row for _, row in good]), strict=True):
        results[number] = encoded_row
        if not isinstance(encoded_row, UserError):
            unread.update(encoder.unread(row))
        elif not (row.begins and row.ends):  # the parts before it are in the store
            raise UserError(f"{encoded_row}; a long document is not skipped, take it out")
    return _joined(rows, results, unread)


def _joined(rows: Sequence[Row | BadRow], results: Sequence[Encoded], unread: Iterable[str]) -> Chunk:
    bad: list[str] = []
    sequences: list[np.ndarray] = [np.empty(0, dtype=np.uint32)]
    ends: list[int] = []
    numbers: list[int] = []
    number = size = 0
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, UserError):
            bad.append(str(result))
        else:
            sequences += result
            for part in result:
                size += len(part)
                if row.ends:
                    ends.append(size)
                    numbers.append(number)
        number += row.ends
    counts = Counts(number, size, len(bad), tuple(bad[:BAD_ROWS_NAMED]), tuple(sorted(unread)))
    return Chunk(np.array(ends, np.int64), np.concatenate(sequences), np.array(numbers, np.int64), counts)
