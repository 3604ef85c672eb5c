"""What disks, numbers, files and clocks do to a run: the fault is real, the run is in the process of the tests.

But where memory ends: oneDNN that once found none for its code makes none for the rest of the process.
"""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch

from bitnet_train.cli import main
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import StageOutput
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training import checkpoint
from tests import forked
from tests.faults import limited
from tests.runs import metrics
from tests.support import TINY_PRETRAIN, environment, text_rows, write_corpus, write_jsonl

pytestmark = pytest.mark.fault

RUN = [
    *TINY_PRETRAIN,
    "model.num_hidden_layers=1",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.val=val.jsonl",
    "max_steps=8",
    "checkpoint_every=2",
    "health_every=0",
    "val_every=2",
]


class Ended(NamedTuple):
    """How a run ended: its exit code, its last lines, its directory."""

    code: int
    said: str
    run_dir: Path

    @property
    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return content

    @property
    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.run_dir / "checkpoints").iterdir()}

    @property
    def model(self) -> bytes:
        return (self.run_dir / "model/model.safetensors").read_bytes()


class Run(Protocol):
    def __call__(self, run_dir: str, *overrides: str) -> Ended: ...


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that runs are started in."""
    folder = write_corpus(tmp_path_factory.mktemp("faults"))
    write_jsonl(folder / "other.jsonl", text_rows(50))
    write_jsonl(folder / "val.jsonl", text_rows(70)[60:])
    return folder


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def started(run_dir: str, *overrides: str) -> Ended:
        monkeypatch.chdir(data)
        monkeypatch.setattr(sys, "argv", ["bitnet-train", *RUN, *overrides, f"run_dir={run_dir}"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        said = capfd.readouterr()
        assert isinstance(exit.value.code, int)
        return Ended(exit.value.code, said.out + said.err, data / run_dir)

    return started


_WHOLE: dict[Path, Ended] = {}


@pytest.fixture
def whole(data: Path, run: Run) -> Ended:
    """A run that nothing happens to; made once."""
    if data not in _WHOLE:
        _WHOLE[data] = run("whole")
        assert _WHOLE[data].code == 0, _WHOLE[data].said
    return _WHOLE[data]


@pytest.fixture
def half(whole: Ended, data: Path, request: pytest.FixtureRequest) -> str:
    """The name of a run directory of its own, as a kill after step 4 leaves it."""
    name = re.sub(r"\W+", "-", f"half-{request.node.name}").rstrip("-")
    shutil.copytree(whole.run_dir, data / name, symlinks=True, ignore=shutil.ignore_patterns("model", "step-*"))
    (data / name / "checkpoints/last").unlink()
    shutil.copytree(data / "fourth", data / name / "checkpoints/step-000004")
    return name


@pytest.fixture(autouse=True)
def _fourth(whole: Ended, data: Path, run: Run) -> None:
    """The checkpoint of step 4 of that run."""
    if not (data / "fourth").exists():
        kept = run("kept", "keep_last=0")
        assert kept.model == whole.model
        (kept.run_dir / "checkpoints/step-000004").rename(data / "fourth")


def without_rates(run_dir: Path) -> list[dict[str, float]]:
    clocked = ("tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gb", "data_wait")
    return [{k: v for k, v in event.items() if k.removeprefix("train/") not in clocked} for event in metrics(run_dir)]


def files(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


def catch_saving(process: "subprocess.Popen[str]", checkpoints: Path) -> Path:
    """Stops a process while it writes a checkpoint, and returns the folder that it is writing."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(checkpoints.glob(".step-*.tmp")):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            found = list(checkpoints.glob(".step-*.tmp"))
            if found and any(checkpoints.glob("step-*")):
                return found[0]
            process.send_signal(signal.SIGCONT)
    raise AssertionError(f"never seen saving: {process.communicate()}")


def test_killed_while_it_writes_a_checkpoint(run: Run, whole: Ended, data: Path) -> None:
    command = [sys.executable, "-m", "bitnet_train", *RUN, "run_dir=killed", "checkpoint_every=1"]
    process = subprocess.Popen(command, cwd=data, env=environment(), text=True, stderr=subprocess.PIPE)
    unfinished = catch_saving(process, data / "killed/checkpoints")
    process.kill()
    process.wait()
    assert unfinished.is_dir()
    again = run("killed", "checkpoint_every=2")
    assert again.code == 0, again.said
    assert again.model == whole.model
    assert without_rates(again.run_dir) == without_rates(whole.run_dir)
    assert files(again.run_dir) == files(whole.run_dir)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(run: Run, whole: Ended) -> None:
    fault = "+callbacks.full={_target_: tests.faults.FullDisk, first: 3, last: 5}"
    ended = run("full", fault, "keep_last=0")
    assert ended.code == 0, ended.said
    assert ended.said.count("no checkpoint was written") == 1
    assert "step 4: no checkpoint was written (" in ended.said
    assert ended.checkpoints == {"step-000002", "step-000006", "step-000008", "last"}
    assert ended.model == whole.model
    assert without_rates(ended.run_dir) == without_rates(whole.run_dir)


def test_a_disk_that_stays_full_ends_in_failure_with_the_last_good_checkpoint(run: Run, whole: Ended) -> None:
    fault = "+callbacks.full={_target_: tests.faults.FullDisk, first: 3, last: 99}"
    with limited(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY):
        ended = run("stays-full", fault)
    assert ended.code == 1
    assert ended.said.count("no checkpoint was written") == 3
    assert "Traceback" not in ended.said
    assert ended.status["state"] == "failed"
    assert "not all of it could be written" in ended.status["reason"]
    assert ended.checkpoints == {"step-000002", "last"}
    assert checkpoint.verifies(ended.run_dir / "checkpoints/step-000002")
    assert not (ended.run_dir / "model").exists()
    again = run("stays-full")
    assert again.code == 0
    assert again.model == whole.model


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The second micro-batch of step 5 has no finite loss: the eleventh and twelfth make the step."""
    step, calls = Pretrain.step, iter(range(1000))

    def poison(self: Pretrain, model: BitNetForCausalLM, batch: Any) -> StageOutput:
        output = step(self, model, batch)
        bad = torch.is_grad_enabled() and next(calls) == 11
        return replace(output, loss_sum=output.loss_sum * float("nan")) if bad else output

    with monkeypatch.context() as patch:
        patch.setattr(Pretrain, "step", poison)
        yield patch


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(
    run: Run, whole: Ended, poisoned: pytest.MonkeyPatch
) -> None:
    ended = run("nan")
    assert ended.code == 1
    assert "Traceback" not in ended.said
    assert "step 5: the loss of rank 0, micro-batch 1 is nan (samples " in ended.said
    assert ended.status["state"] == "failed"
    assert ended.status["step"] == 5
    assert ended.checkpoints == {"step-000002", "step-000004", "last"}
    poisoned.undo()
    again = run("nan")
    assert again.model == whole.model


def test_a_step_without_a_finite_loss_is_left_out_where_the_option_says_so(
    run: Run, poisoned: pytest.MonkeyPatch
) -> None:
    ended = run("skips", "skip_nonfinite=1")
    assert ended.code == 0, ended.said
    assert "the update was not made, 1 of at most 1 in a row" in ended.said
    events = metrics(ended.run_dir)
    assert [event["train/skipped_steps"] for event in events if "train/skipped_steps" in event] == [0] * 5 + [1] * 3
    assert [event["step"] for event in events if "train/loss" in event] == [1, 2, 3, 4, 5, 7, 8]
    assert all(value == value for event in events for value in event.values())


def test_a_diverging_run_ends_by_itself(run: Run) -> None:
    ended = run("diverges", "schedule.peak_lr=1e38", "val_every=100")
    assert ended.code == 1
    assert "the update was not made. Lower schedule.peak_lr" in ended.said
    assert "(samples " in ended.said


def test_what_may_differ_is_named(run: Run, half: str) -> None:
    changed = ["schedule.peak_lr=1e-4", "max_steps=6", "data.train=other.jsonl", "optimizer.grad_clip=0.5"]
    refused = run(half, *changed)
    assert refused.code == 2
    for name in ("schedule: ", "max_steps: 8 there, 6 now", "data.train: ", "optimizer.grad_clip: "):
        assert name in refused.said
    allowed = run(half, *changed, "resume_allow=[schedule,max_steps,data.train,optimizer.grad_clip]")
    assert allowed.code == 0, allowed.said
    assert [event["step"] for event in metrics(allowed.run_dir) if "train/loss" in event] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["model", "tokenizer", "optimizer", "nonsense"])
def test_what_may_never_differ(run: Run, half: str, name: str) -> None:
    refused = run(half, f"resume_allow=[{name}]")
    assert refused.code == 2
    assert "resume_allow must name some of optimizer.grad_clip, stage, schedule, max_steps, seed" in refused.said


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_a_checkpoint_does_not_run(run: Run, half: str, data: Path, tmp_path: Path) -> None:
    folder = data / half / "checkpoints/step-000004"
    torch.save({"identity": {}, "payload": Payload(tmp_path / "ran")}, folder / "state.pt")
    checkpoint.seal(folder)
    refused = run(half)
    assert refused.code == 2
    assert "step-000004/state.pt: holds more than tensors and plain containers" in refused.said
    assert "Traceback" not in refused.said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.ckpt"])
def test_a_pickle_in_a_model_folder_is_refused(run: Run, whole: Ended, data: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(whole.run_dir / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save(Payload(tmp_path / "ran"), folder / name)
    refused = run("from-pickle", f"init_from={folder}")
    assert refused.code == 2
    assert f"{folder}/{name}: is a pickle, which can run code when it is read" in refused.said
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_cache_does_not_run(run: Run, whole: Ended, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "cache", tmp_path / "cache")
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    for file in stored:
        file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    ended = run("cache", f"data.cache_dir={tmp_path / 'cache'}")
    assert len(stored) >= 8
    assert ended.model == whole.model
    assert not (tmp_path / "ran").exists()


def test_an_environment_that_lets_pickles_run_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused = run("forced")
    assert refused.code == 2
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in refused.said


def test_out_of_memory_is_one_line_and_a_sweep_goes_on(data: Path) -> None:
    sizes = ["hydra.mode=MULTIRUN", "global_batch_size=16384,4", "micro_batch_size=${global_batch_size}"]
    ended = forked.train(*RUN, *sizes, "max_steps=1", "data.val=null", "run_dir=sweep", cwd=data, memory=1 << 29)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    line = next(line for line in said.splitlines() if "out of memory" in line)
    assert "out of memory on rank 0, in step 0 with micro-batches of 16384 rows of 64 positions" in line
    assert "lower micro_batch_size or data.sequence_length, or set execution.activation_checkpointing=full" in line
    assert "Traceback" not in said
    states = [json.loads((data / "sweep" / job / "status.json").read_text())["state"] for job in ("0", "1")]
    assert states == ["failed", "done"]


def test_a_model_that_does_not_fit_into_memory_is_one_line(data: Path) -> None:
    ended = forked.train(*RUN, "model.vocab_size=4000000", "run_dir=too-large", cwd=data, memory=1 << 29)
    assert ended.returncode == 1
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert "out of memory on rank 0, while the model is built; take a smaller model=" in line


def test_a_run_directory_that_cannot_be_written_is_one_line(run: Run) -> None:
    ended = run("/proc/nothing")
    assert ended.code == 2
    assert len(ended.said.strip().splitlines()) == 1
    assert "/proc/nothing" in ended.said


def test_a_run_directory_that_vanishes_is_not_made_again(run: Run) -> None:
    ended = run("vanished", "+callbacks.vanish={_target_: tests.faults.Vanish, step: 3}")
    assert ended.code == 1
    assert "metrics.jsonl: cannot be written (No such file or directory)" in ended.said
    assert "step 4: no checkpoint was written (the run directory has vanished" in ended.said
    assert "error: the run has come to its end, but not all of it could be written" in ended.said
    assert not ended.run_dir.exists()


def test_a_clock_that_jumps_changes_nothing(run: Run, whole: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    jumps = iter(now + (-1) ** i * i * 86400 for i in range(100_000))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    ended = run("clock")
    assert ended.code == 0, ended.said
    assert ended.model == whole.model
    assert without_rates(ended.run_dir) == without_rates(whole.run_dir)
    assert all(event.get("train/tokens_per_second", 1.0) > 0.0 for event in metrics(ended.run_dir))


def test_the_best_checkpoints_are_kept_beside_the_last(run: Run, half: str) -> None:
    options = ["schedule.second_lr=0.3", "resume_allow=[schedule]", "keep_best=1", "keep_last=1"]
    ended = run(half, *options)
    assert ended.code == 0, ended.said
    losses = {
        event["step"]: event["val/loss"]
        for event in metrics(ended.run_dir)
        if event.get("step", 0) >= 4 and "val/loss" in event
    }
    best = min(losses, key=lambda step: losses[step])
    assert best != 8
    assert ended.checkpoints == {f"step-{best:06d}", "step-000008", "last", "best"}
    assert os.readlink(ended.run_dir / "checkpoints/best") == f"step-{best:06d}"
