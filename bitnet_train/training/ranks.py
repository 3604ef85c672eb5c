"""The ranks of a run: the processes that share its work, and what all of them agree on.

A process is a rank of several when a launcher says so (torch.distributed.run, or srun with several tasks); Lightning's
own description of that environment is used. The group is joined before Lightning starts, over gloo for what lies on the
CPU and nccl for what lies on a GPU, so that decisions (which checkpoint, whether to stop) can be agreed on at any time.
With a single process every function here is the identity.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from bitnet_train.errors import UserError

T = TypeVar("T")


def environment() -> ClusterEnvironment | None:
    """The launcher's description of this process, or None for a process that stands alone."""
    found: ClusterEnvironment | None = None
    if TorchElasticEnvironment.detect():
        found = TorchElasticEnvironment()
    elif "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():  # srun's; a batch script has the other variables
        found = SLURMEnvironment(auto_requeue=False)  # Lightning's own way saves inside a signal handler
    return found if found is not None and found.world_size() > 1 else None


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Joins the group for as long as the block runs; a collective that waits longer than `timeout` seconds fails.

    A caller that has joined it already stays in it.
    """
    found = environment()
    if found is None or dist.is_initialized():
        yield
        return
    os.environ |= {"MASTER_ADDR": found.main_address, "MASTER_PORT": str(found.main_port)}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank())
    dist.init_process_group(
        backend, rank=found.global_rank(), world_size=found.world_size(), timeout=timedelta(seconds=timeout)
    )
    yield  # after an error the others may be gone: nothing is waited for, the process ends
    dist.barrier()
    dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank is the one that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank is here."""
    if count() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """The value of every rank, on every rank: plain containers and CPU tensors."""
    values: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def maxima(values: Sequence[int]) -> list[int]:
    """The largest of each value over all ranks."""
    if count() == 1:
        return list(values)
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest]


def on_first(function: Callable[[], T]) -> T:
    """What the function returns on the first rank, which alone calls it.

    Raises:
        Exception: what it raised there, on every rank.
    """
    if count() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error if isinstance(error, UserError | OSError) else RuntimeError(f"rank 0: {error!r}")
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def attempt(write: Callable[[], object]) -> str:
    """Why some rank could not write, on every rank the same; "" if all could. All ranks call it together."""
    failure = ""
    try:
        write()
    except UserError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return next(filter(None, gather(failure)), "")


def check_same(name: str, value: str) -> None:
    """Refuses a group whose ranks do not see the same.

    Raises:
        UserError: the value of another rank differs from that of the first.
    """
    values = gather(value)
    strangers = [number for number, other in enumerate(values) if other != values[0]]
    if strangers:
        raise UserError(
            f"{name} of rank {strangers[0]} is not that of rank 0 ({values[strangers[0]]} against {values[0]}); start "
            "every rank with the same command, the same files and a run_dir that all of them share"
        )
