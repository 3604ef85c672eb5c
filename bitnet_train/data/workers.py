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
    """The sequences of consecutive rows: their lengths, their tokens joined, the row of each counted from 0."""

    lengths: np.ndarray
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
        if len(chunk) == _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encoded_rows(encoder: Encoder, rows: Sequence[Row | BadRow]) -> Chunk:
    """One chunk."""
    results: list[Encoded] = [row.error if isinstance(row, BadRow) else [] for row in rows]
    good = [(number, row) for number, row in enumerate(rows) if isinstance(row, Row)]
    unread: set[str] = set()
    for (number, row), encoded_row in zip(good, encoder.encode([row for _, row in good]), strict=True):
        results[number] = encoded_row
        if not isinstance(encoded_row, UserError):
            unread.update(encoder.unread(row))
    return _joined(results, unread)


def _joined(results: Sequence[Encoded], unread: Iterable[str]) -> Chunk:
    bad: list[str] = []
    sequences: list[np.ndarray] = []
    numbers: list[int] = []
    for number, result in enumerate(results):
        if isinstance(result, UserError):
            bad.append(str(result))
        else:
            sequences += result
            numbers += [number] * len(result)
    tokens = np.concatenate(sequences) if sequences else np.empty(0, dtype=np.uint32)
    counts = Counts(len(results), len(tokens), len(bad), tuple(bad[:BAD_ROWS_NAMED]), tuple(sorted(unread)))
    return Chunk(
        np.array([len(s) for s in sequences], dtype=np.int64), tokens, np.array(numbers, dtype=np.int64), counts
    )
