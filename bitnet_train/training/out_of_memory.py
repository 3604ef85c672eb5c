"""Out of memory, said in one line: how large a step was, and the settings that make it smaller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitnet_train.errors import RunFailed
from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule


@contextmanager
def explained(module: TrainingModule) -> Iterator[None]:
    """Turns the ways in which torch says that memory has run out into one.

    Raises:
        RunFailed: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        rows, length = module.batch_shape or (0, 0)
        raise RunFailed(
            f"step {module.step}: out of memory on rank {ranks.rank()}, with micro-batches of {rows} rows of {length} "
            "positions; lower micro_batch_size or data.sequence_length, or set execution.activation_checkpointing=full"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU has an exception of its own; the CPU's allocator raises a plain RuntimeError."""
    said = ("can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)
