"""One command, whatever the number of ranks: the command composes the configuration, the ranks read it as YAML text.

    one rank                    the run happens in the process of the command
    several                     a `training.worker` per rank, started and watched by torch's own process launcher
    started as a rank           by torch.distributed.run or srun: the process takes its place among the others

The ranks never see Hydra, so that they cannot differ in what they were told. They die with the command, and all of them
when one dies. Each ends with the exit code that the command has for the same outcome.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    ProcessFailure,
    RunProcsResult,
    SubprocessContext,
)

from bitnet_train.config import RunConfig
from bitnet_train.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER_ERROR, RunFailed, UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.link import followed
from bitnet_train.memory import machine_bytes
from bitnet_train.training.imports import import_lightning
from bitnet_train.training.signals import StopRequested, handled_by
from bitnet_train.training.status import read_status, report_status
from bitnet_train.training.worker import own_rank

log = logging.getLogger(__name__)
logging.getLogger(SubprocessContext.__module__).setLevel(logging.CRITICAL)  # `_conclude` says it, once

_BYTES_PER_RANK = 100 << 20  # of torch and Lightning, imported
GRACE = 5.0  # seconds that ranks have to end by themselves once another has ended badly
_EXPLAINED = f"{RunFailed.__name__}: "  # how the message of one that needs no traceback begins
_TIMED_OUT = ("timed out", "application timeout")  # how gloo says that it has waited too long for another rank
_ABORTED = -signal.SIGABRT  # how NCCL ends a rank that has waited too long for the others


def start(settings: RunConfig, config: DictConfig, run_dir: Path) -> None:
    """Runs in this process or in as many as the configuration asks for.

    Raises:
        UserError: the configuration or the data is wrong.
        StopRequested: the run was asked to stop; its state is saved.
        RunFailed: a launched rank has failed, died or hung.
    """
    _check_accelerator(config.trainer.get("accelerator", "auto"))
    count = _count(config.trainer) if own_rank() is None else 1
    if count > 1:
        _launch(config, run_dir, count)
        return
    import_lightning()
    from bitnet_train.training.run import run

    run(settings, config, run_dir)


def _check_accelerator(accelerator: str) -> None:
    """Before data is read and a model made.

    Raises:
        UserError: it is to be a GPU, and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise UserError(
            f"trainer.accelerator={accelerator} needs a GPU that torch {torch.__version__} can use, and it sees none; "
            "use trainer=cpu, or install torch's build for the GPU"
        )


def _count(trainer: DictConfig) -> int:
    """How many ranks the command is to start.

    Raises:
        UserError: they are not all on this machine, or their number is none.
    """
    devices = trainer.get("devices", "auto")
    if int(trainer.get("num_nodes", 1)) > 1:
        raise UserError(
            "trainer.num_nodes is above 1, and this command starts processes on its own machine only; start it on "
            "every machine with torchrun or srun, a process for each device"
        )
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if trainer.get("accelerator", "auto") != "cpu" else 1
    if not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"trainer.devices must be a number of at least 1, or auto, got {devices}")
    if int(devices) > (most := max(1, machine_bytes() // _BYTES_PER_RANK)):
        raise UserError(
            f"trainer.devices must be at most {most} on this machine, got {devices}: each is a process, which takes "
            f"{_BYTES_PER_RANK >> 20} MB at least"
        )
    return int(devices)


def _launch(config: DictConfig, run_dir: Path, count: int) -> None:
    """Starts the ranks, hands them the first signal, and makes of their ends the outcome of the run."""
    OmegaConf.update(config, "trainer.devices", count, force_add=True)
    resolved = run_dir / ".hydra/resolved.yaml"
    resolved.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(resolved) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the ranks find each other
    with tempfile.TemporaryDirectory(prefix="bitnet-train-ranks-") as logs:
        ranks = Ranks(count, (str(resolved), str(run_dir)), store.port, logs)
        try:
            with handled_by(ranks.hand_on):
                ranks.start()
                result = ranks.wait(period=0.1)
        finally:
            ranks.close()
    assert result is not None  # no time-out was given
    _conclude(ranks, result, run_dir)


class Ranks(SubprocessContext):
    """The processes of a run on this machine.

    Args:
        count: how many.
        arguments: of `training.worker`.
        port: of the store on this machine, over which they find each other.
        logs: a temporary folder; a rank that fails leaves its exception there.
    """

    def __init__(self, count: int, arguments: tuple[str, ...], port: int, logs: str) -> None:
        common = {
            "LAUNCHER_PID": str(os.getpid()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "local",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        super().__init__(
            name="rank",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(count), ("-m", "bitnet_train.training.worker", *arguments)),
            envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        self.asked = 0  # the signal that the ranks were handed, 0 for none
        self.stuck: set[int] = set()  # ranks that did not end though another had ended badly

    def start(self) -> None:
        """Starts the processes. The signals are the command's, not the library's."""
        super()._start()  # type: ignore[no-untyped-call]
        self._tell()  # what came meanwhile

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        """Hands a signal to every rank, once: they agree on a step to stop at, also if it is sent again."""
        if not self.asked:
            self.asked = number
            self._tell()

    def _tell(self) -> None:
        for handler in self.subprocess_handlers.values() if self.asked else ():
            handler.proc.send_signal(self.asked)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Kills the ranks that still run after `GRACE`: one that waits for the others would hear no other signal."""
        deadline = time.monotonic() + GRACE
        while (running := self._running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.stuck |= running
        super().close(signal.SIGKILL, timeout)

    def _running(self) -> set[int]:
        return {rank for rank, handler in self.subprocess_handlers.items() if handler.proc.poll() is None}


def _conclude(ranks: Ranks, result: RunProcsResult, run_dir: Path) -> None:
    """The outcome of the run: that of the rank to blame.

    Raises:
        UserError, StopRequested, RunFailed: as `start` says.
    """
    failures = result.failures
    codes = {failure.exitcode for failure in failures.values()}
    if EXIT_REQUEUE in codes or any(_was_deaf(failure, ranks.asked) for failure in failures.values()):
        raise StopRequested(signal.Signals(ranks.asked).name if ranks.asked else read_status(run_dir)["reason"])
    for failure in failures.values():
        if failure.exitcode == EXIT_USER_ERROR:
            raise UserError(_exception(failure)[0].removeprefix("UserError: "))
        if (message := _exception(failure)[0]).startswith("RunFailed: "):  # it says itself what to do
            raise RunFailed(message.removeprefix("RunFailed: "))
    if failures:
        reason = _reason(failures, ranks.stuck)
        report_status(run_dir, "failed", read_status(run_dir)["step"] or 0, reason)
        raise RunFailed(f"{reason}; start the same command again: it goes on from step {_saved_step(run_dir)}")


def _was_deaf(failure: ProcessFailure, signal_number: int) -> bool:
    """Whether the signal (0 for none) ended a rank that could not listen yet: Python itself was still starting.

    It dies of the signal, or ends with 1 and a word of its own, without the exception that a rank leaves.
    """
    unexplained = failure.exitcode == EXIT_FAILURE and isinstance(failure.message, str)
    return signal_number > 0 and (failure.exitcode == -signal_number or unexplained)


def _saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, from the name to which `checkpoints/last` leads."""
    name = followed(run_dir / "checkpoints/last").name
    return int(name.rpartition("-")[2]) if "-" in name else 0


def _reason(failures: dict[int, ProcessFailure], stuck: set[int]) -> str:
    """Names the rank to blame: one that hung, else one that died, else the first with an exception of its own."""
    first = {rank: failure for rank, failure in failures.items() if rank not in stuck}
    if stuck and any(failure.exitcode == _ABORTED or _waited(failure) for failure in first.values()):
        return f"{_named(failures, stuck)} hung: the others waited for rank_timeout"
    killed = {rank for rank, failure in first.items() if failure.exitcode < 0}
    if killed:
        name = first[min(killed)].signal_name()
        hint = " (by hand, or by the system for lack of memory)" if name == "SIGKILL" else ""
        return f"{_named(failures, killed)} was ended by {name}{hint}"
    rank = min(first, key=lambda rank: (_lost_another(first[rank]), first[rank].timestamp, rank))
    message, trace = _exception(first[rank])
    if not message.startswith(_EXPLAINED):
        log.error("%s", trace)
    return f"{_named(failures, {rank})} failed: {message.removeprefix(_EXPLAINED)}"


def _named(failures: dict[int, ProcessFailure], chosen: set[int]) -> str:
    return ", ".join(f"rank {rank} (process {failures[rank].pid})" for rank in sorted(chosen))


def _exception(failure: ProcessFailure) -> tuple[str, str]:
    """The exception that a rank left: its type and message in one line, and the traceback."""
    message: Any = failure.message
    if isinstance(message, str):
        return f"exit code {failure.exitcode}", message
    return " ".join(message["message"].split()), message["extraInfo"]["py_callstack"]


def _waited(failure: ProcessFailure) -> bool:
    """Whether a collective has waited for too long."""
    return _says(failure, *_TIMED_OUT)


def _lost_another(failure: ProcessFailure) -> bool:
    """Whether the exception says only that another rank is gone."""
    return _says(failure, "connection closed by peer", "connection reset by peer", *_TIMED_OUT)


def _says(failure: ProcessFailure, *words: str) -> bool:
    text = _exception(failure)[1].lower()
    return any(some in text for some in words)
