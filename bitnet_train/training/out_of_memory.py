"""Out of memory, said in one line: what was too large, and the settings that make it smaller."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bitnet_train.errors import RunFailed
from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule


@contextmanager
def explained(what: Callable[[], str]) -> Iterator[None]:
    """Turns the ways in which torch says that memory has run out into one.

    Args:
        what: says what there was no memory for, and what takes less.

    Raises:
        RunFailed: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RunFailed(f"out of memory on rank {ranks.rank()}, {what()}") from None


def building() -> str:
    """Of a run that has not begun."""
    return (
        "while the model is built; take a smaller model=, share it out with trainer=fsdp, or keep smaller moments with "
        "optimizer=adamw_8bit"
    )


def training(module: TrainingModule) -> str:
    """Of a step; before the first one, of a model on its way to its device."""
    if module.batch_shape is None:
        return building()
    rows, length = module.batch_shape
    return (
        f"in step {module.step} with micro-batches of {rows} rows of {length} positions; lower micro_batch_size or "
        "data.sequence_length, or set execution.activation_checkpointing=full"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has an exception of its own; the CPU's, and what asks the driver itself, say it in words."""
    said = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)
