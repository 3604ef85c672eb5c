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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.formats.shards import State, split
from bitnet_train.training import checkpoint, ranks

log = logging.getLogger(__name__)


class Saver:
    """Saves into one folder.

    Args:
        folder: the run's checkpoints.
        keep_last: how many of them to keep; 0 keeps all.
        timeout: seconds after which a rank gives up waiting for the others.
    """

    def __init__(self, folder: Path, keep_last: int, timeout: float) -> None:
        self.folder, self.keep_last, self.timeout = folder, keep_last, timeout
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def save(self, step: int, state: State) -> None:
        """Saves the state after `step` updates; all ranks call it together. A sharded one may be committed later.

        Raises:
            OSError: this state, or the one before, could not be written.
        """
        rest, tensors = split(state)
        if tensors:
            self.wait()
            self._begin(step, rest, tensors)
        else:
            ranks.on_first(lambda: checkpoint.save(self.folder, step, state, self.keep_last))

    def _begin(self, step: int, rest: State, tensors: dict[str, Tensor]) -> None:
        target, stack = checkpoint.folder_of(self.folder, step), ExitStack()
        temporary = ranks.on_first(lambda: None if target.exists() else stack.enter_context(atomic_folder(target)))
        if temporary is None:
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        if ranks.is_first():
            torch.save(rest, temporary / checkpoint.STATE)
        written = dcp.async_save(
            tensors,
            storage_writer=dcp.FileSystemWriter(temporary),
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),
            process_group=self._group,
        )
        self._pending = self._thread.submit(self._commit, written, target, temporary, stack)

    def _commit(self, written: Any, target: Path, temporary: Path, stack: ExitStack) -> None:
        """In the thread: waits until the rows of all ranks are written; the first rank then commits."""
        with stack:
            written.result()
            if ranks.is_first():
                checkpoint.seal(temporary)
        if ranks.is_first():
            checkpoint.retain(target, self.keep_last)

    def wait(self) -> None:
        """Returns when nothing is in flight any more; all ranks call it together.

        Raises:
            OSError: on every rank, if any of them could not write.
        """
        failure, pending, self._pending = "", self._pending, None
        if pending is not None:
            try:
                pending.result()
            except BaseException as error:  # torch's CheckpointException is no Exception
                failure = f"{type(error).__name__}: {error}"
        failures = [reason for reason in ranks.gather(failure) if reason]
        if failures:
            raise OSError(f"a checkpoint was not written: {failures[0]}")
