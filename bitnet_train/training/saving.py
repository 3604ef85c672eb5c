"""Writes the states of a run: whole ones at once, by the first rank; sharded ones by all ranks, while training goes on.

A sharded state is copied to host memory, then written by a thread of each rank; when all rows are on the disk, the
thread of the first rank commits the checkpoint as any other (`checkpoint`). One is in flight at most. The threads agree
in a process group of their own: in that of the training, their messages would mix with its.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from bitnet_train.formats.shards import State, split
from bitnet_train.training import checkpoint, ranks

log = logging.getLogger(__name__)


class _Writer(FileSystemWriter):
    """Says why a rank could not write: the others are told the exception alone, without its cause."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        with checkpoint.refusals(Path(self.path)):
            return super().write_data(plan, planner)


class Saver:
    """Saves into one folder. All ranks call `save` and `wait` together.

    Args:
        folder: the run's checkpoints.
        keep_last: see `checkpoint.save`.
        keep_best: see `checkpoint.save`.
        timeout: seconds after which a rank gives up waiting for the others.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int, timeout: float) -> None:
        self.folder, self.keep_last, self.keep_best, self.timeout = folder, keep_last, keep_best, timeout
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(self, step: int, state: State, loss: float | None = None) -> str:
        """Saves the state after `step` updates, whose validation loss may be known.

        Returns:
            why it was not written, on every rank the same; "" if it was, or if it is on its way.
        """
        rest, tensors = split(state)
        keep = (self.keep_last, self.keep_best, loss)
        if not tensors:
            return ranks.attempt(lambda: checkpoint.save(self.folder, step, state, *keep) if ranks.is_first() else None)
        earlier = self.wait()
        if earlier and ranks.is_first():
            log.warning("step %d: the checkpoint before this step was not written (%s)", step, earlier)
        return self._begin(checkpoint.folder_of(self.folder, step), rest, tensors, keep)

    def _begin(self, target: Path, rest: State, tensors: dict[str, Tensor], keep: tuple[int, int, float | None]) -> str:
        stack = ExitStack()
        opened: list[Path] = []

        def open_folder() -> None:
            if ranks.is_first() and not target.exists():
                opened.append(stack.enter_context(checkpoint.committed(target, rest, *keep)))

        failure = ranks.attempt(open_folder)
        (temporary,) = ranks.on_first(lambda: opened) or (None,)
        if temporary is None:
            return failure
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        written = async_save(
            tensors,
            storage_writer=_Writer(temporary),
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),
            process_group=self._group,
        )
        self._pending = self._thread.submit(commit, written, stack)
        return ""

    def wait(self) -> str:
        """Returns when nothing is on its way any more: why that was not written, on every rank the same."""
        return ranks.attempt(self.wait_here)

    def wait_here(self) -> None:
        """The same for this rank alone, which need not ask the others.

        Raises:
            OSError: it was not written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def commit(written: Any, stack: ExitStack) -> None:
    """In the thread: the rows of all ranks are written when `written` is done; the stack of the first rank commits.

    Raises:
        OSError: a rank could not write.
    """
    with stack:
        try:
            written.result()
        except CheckpointException as error:  # is no Exception
            cause, _ = next(iter(error.failures.values()))
            raise cause if isinstance(cause, OSError) else OSError(str(cause)) from None
