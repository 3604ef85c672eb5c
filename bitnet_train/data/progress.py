"""How far a token cache is: a bar on a terminal, otherwise a line from time to time. Short builds say nothing."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bitnet_train.data.paths import size_of

_QUIET_SECONDS, _LINE_SECONDS = 1.0, 30.0


class BuildProgress:
    """Shows the share of the sources' bytes that was read, and tokens per second, on standard error.

    Args:
        files: the sources; of hub ids the size is unknown, so that they show tokens only.
    """

    def __init__(self, files: Sequence[str]) -> None:
        sizes = [size_of(file) for file in files]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._read, self._first_tokens = 0, -1
        self._started = self._shown = time.monotonic()
        self._bar: Progress | None = None

    def read(self, count: int) -> None:
        """So many bytes more of the sources were read."""
        self._read += count

    def show(self, tokens: int) -> None:
        """So many tokens are in the cache now."""
        if self._first_tokens < 0:
            self._first_tokens = tokens  # those of an earlier start are not counted as speed
        now = time.monotonic()
        if now - self._started < _QUIET_SECONDS:
            return
        text = f"{tokens:,} tokens, {(tokens - self._first_tokens) / (now - self._started):,.0f}/s"
        if sys.stderr.isatty():
            self._draw(text)
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            share = f"{100 * self._read / self._total:.0f} % read, " if self._total else ""
            print(f"data: tokenizing: {share}{text}", file=sys.stderr, flush=True)

    def _draw(self, text: str) -> None:
        if self._bar is None:
            columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.add_task("", total=self._total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._read, description=text)

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
