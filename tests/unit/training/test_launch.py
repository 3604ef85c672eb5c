"""Which rank is to blame, and how many there are to be. The processes themselves are in integration/test_ranks.py."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing import ProcessFailure, RunProcsResult

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.training import launch, worker
from bitnet_train.training.signals import StopRequested, stop_on_signals

pytestmark = pytest.mark.fault

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
WAITED = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"
CLOSED = "RuntimeError: Application timeout caused pair closure"


def failure(tmp_path: Path, rank: int, code: int, error: str = "") -> ProcessFailure:
    """How a rank of process 100 + rank has ended; `error` is the exception that it left."""
    file = tmp_path / f"{rank}.json"
    if error:
        extra = {"py_callstack": f"Traceback of\n{error}", "timestamp": "1"}
        file.write_text(json.dumps({"message": {"message": error, "extraInfo": extra}}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(file))


CASES: dict[str, tuple[list[tuple[int, str]], set[int], str]] = {
    "killed": ([(1, LOST), (-9, "")], set(), "rank 1 (process 101) was ended by SIGKILL"),
    "killed, the other waits": ([(-9, ""), (-9, "")], {1}, "rank 0 (process 100) was ended by SIGKILL"),
    "crashed": ([(-11, ""), (1, LOST)], set(), "rank 0 (process 100) was ended by SIGSEGV"),
    "an exception of its own": ([(1, LOST), (1, "OSError: full")], set(), "rank 1 (process 101) failed: OSError: full"),
    "an exception, the other waits": ([(1, "OSError: full"), (-9, "")], {1}, "rank 0 (process 100) failed: OSError"),
    "hung, gloo": ([(1, WAITED), (-9, "")], {1}, "rank 1 (process 101) hung"),
    "hung, gloo's other word": ([(1, CLOSED), (-9, "")], {1}, "rank 1 (process 101) hung"),
    "hung, nccl": ([(-9, ""), (-6, "")], {0}, "rank 0 (process 100) hung"),
    "hung, of three": ([(1, LOST), (1, WAITED), (-9, "")], {2}, "rank 2 (process 102) hung"),
    "no word": ([(1, LOST), (3, "")], set(), "rank 1 (process 101) failed: exit code 3"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rank_to_blame_is_named(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    ends, stuck, expected = CASES[case]
    failures = {rank: failure(tmp_path, rank, *end) for rank, end in enumerate(ends)}
    with caplog.at_level(logging.ERROR):
        reason = launch._reason(failures, stuck)
    assert reason.startswith(expected)
    assert ("Traceback of" in caplog.text) == ("OSError" in expected)  # an exception is shown, and only the one


def test_a_run_directory_that_vanished_hides_no_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = {0: failure(tmp_path, 0, -9), 1: failure(tmp_path, 1, 1, LOST)}
    with pytest.raises(RunFailed, match=r"rank 0 \(process 100\) was ended by SIGKILL .* goes on from step 0"):
        launch._conclude(launch.Ranks(2, (), 0, str(tmp_path)), RunProcsResult(failures=failures), tmp_path / "gone")
    assert "status.json cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("code", "error", "asked"), [(-2, "", 2), (1, "", 2), (1, "OSError", 2), (-9, "", 2), (1, "", 0)]
)
def test_a_signal_before_a_rank_can_listen_is_a_stop(tmp_path: Path, code: int, error: str, asked: int) -> None:
    """Python that is interrupted while it starts ends with 1. A rank's exception and another signal are failures."""
    ranks = launch.Ranks(2, (), 0, str(tmp_path))
    ranks.asked = asked
    ended = RunProcsResult(failures={0: failure(tmp_path, 0, code, error)})
    with pytest.raises(StopRequested if asked and code > -9 and not error else RunFailed):
        launch._conclude(ranks, ended, tmp_path)


def test_a_rank_whose_run_directory_vanished_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunFailed, match=f"run_dir={tmp_path}/gone: .*No such file or directory: .*; see who removes"):
        worker._run(tmp_path / "gone/.hydra/resolved.yaml", tmp_path / "gone")


@pytest.mark.parametrize(
    ("trainer", "count"),
    [({"devices": 1}, 1), ({"devices": "2"}, 2), ({"devices": "auto", "accelerator": "cpu"}, 1), ({"devices": 4}, 4)],
)
def test_the_number_of_ranks_is_that_of_the_devices(trainer: dict[str, object], count: int) -> None:
    assert launch._count(OmegaConf.create(trainer)) == count


def test_every_gpu_of_the_machine_has_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [launch._count(OmegaConf.create({"devices": devices})) for devices in ("auto", -1)] == [8, 8]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": 0}, "trainer.devices must be a number of at least 1, or auto, got 0"),
        ({"devices": "two"}, "got two"),
        ({"devices": 10**9}, "on this machine, got 1000000000: each is a process, which takes 100 MB"),
        ({"devices": 10**30}, "trainer.devices must be at most"),
        ({"devices": 8, "num_nodes": 2}, "start it on every machine with torchrun or srun"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_refused(trainer: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch._count(OmegaConf.create(trainer))


def test_a_stop_ends_a_process_that_does_not_catch_it_with_85() -> None:
    code = "from bitnet_train.training.signals import StopRequested; raise StopRequested('SIGTERM')"
    assert subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL).returncode == 85


def test_signals_after_the_first_are_ignored_until_the_block_ends() -> None:
    def signalled() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGUSR1)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="SIGTERM"), stop_on_signals():
        signalled()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_missed_first(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match=f"trainer.accelerator={accelerator} needs a GPU .* use trainer=cpu"):
        launch._check_accelerator(accelerator)
    launch._check_accelerator("auto")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    launch._check_accelerator(accelerator)
