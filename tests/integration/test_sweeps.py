"""Sweeps, searches and SLURM jobs: every job has its folder, no failure ends the others, and a table sums them up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.cli import main
from bitnet_train.training import sweep
from bitnet_train.training.signals import StopRequested
from tests.forked import python
from tests.imitated_slurm import install
from tests.runs import last, metrics
from tests.support import TINY_PRETRAIN, environment, write_corpus

JOB = [*TINY_PRETRAIN, "max_steps=4", "val_every=2"]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
HARM = "+callbacks.harm._target_=tests.steps.FailingJobs"
SLOW = ["+callbacks.slow._target_=tests.steps.Slow", "+callbacks.slow.seconds=0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("sweeps"))


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command in this process, where nothing has to be imported again."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["bitnet-train", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert isinstance(exit.value.code, int)
    return exit.value.code


def rows(sweep_dir: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = json.loads((sweep_dir / "sweep.json").read_text())
    return table


@pytest.mark.fault
def test_failed_jobs_do_not_end_a_sweep(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second job asks for what is not possible, the third fails inside of training; the fourth is done."""
    code = command(folder, monkeypatch, "-m", *JOB, "run_dir=grid", "logger=wandb", "seed=0,1,2,3", HARM)
    table = rows(folder / "grid")
    assert [(row["job"], row["state"], row["code"]) for row in table] == [
        ("0", "done", 0),
        ("1", "failed", 2),
        ("2", "failed", 1),
        ("3", "done", 0),
    ]
    assert code == 1
    assert [len(list((folder / f"grid/{job}").rglob("*.wandb"))) for job in (0, 3)] == [1, 1]
    assert "no seed 1" in table[1]["reason"]
    assert table[3]["step"] == 4
    assert table[3]["objective"] == last(folder / "grid/3", "val/loss")
    assert "seed=3" in table[3]["overrides"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-5].split()[:4] == ["job", "state", "step", "val/loss"]
    assert printed[-1].split()[-1] == "seed=3"  # what all jobs have in common is left out


def test_a_job_that_cannot_be_composed_does_not_end_a_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(folder, monkeypatch, "-m", *JOB, "run_dir=composed", "dry_run=true", "stage=nope,pretrain") == 2
    table = rows(folder / "composed")
    assert [(row["job"], row["state"], row["code"]) for row in table] == [("0", "failed", 2), ("1", "done", 0)]
    assert "stage has no 'nope'; it has " in table[0]["reason"]
    assert "stage=nope" in table[0]["overrides"]


def test_the_same_sweep_again_finds_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-m", *JOB, "run_dir=again", "seed=0,1"]
    assert command(folder, monkeypatch, *arguments) == 0
    before = [(folder / f"again/{job}/metrics.jsonl").read_bytes() for job in (0, 1)]
    first = rows(folder / "again")
    assert command(folder, monkeypatch, *arguments) == 0
    assert [(folder / f"again/{job}/metrics.jsonl").read_bytes() for job in (0, 1)] == before
    assert rows(folder / "again") == first


@pytest.mark.fault
def test_a_signal_stops_the_sweep_and_not_only_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_train.training.run.build", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert command(folder, monkeypatch, "-m", *JOB, "run_dir=stopped", "seed=0,1") == 85
    assert [(row["job"], row["state"], row["reason"]) for row in rows(folder / "stopped")] == [
        ("0", "requeue", "SIGTERM")
    ]


def end_every_job(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """As training ends at a step boundary; `test_training.py` lets the time of a run pass."""

    def start(settings: Any, config: Any, run_dir: Path) -> None:
        (run_dir / "metrics.jsonl").write_text('{"step": 1, "val/loss": 0.5}\n')
        raise StopRequested(reason)

    monkeypatch.setattr("bitnet_train.training.launch.start", start)


@pytest.mark.fault
def test_a_file_stop_ends_the_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_every_job(monkeypatch, "STOP file")
    assert command(folder, monkeypatch, "-m", *JOB, "run_dir=asked", "seed=0,1") == 85
    assert [row["state"] for row in rows(folder / "asked")] == ["requeue"]


@pytest.mark.fault
def test_a_time_that_is_over_ends_the_job_and_the_search_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    end_every_job(monkeypatch, "trainer.max_time")
    words = ["hparams_search=optuna", "run_dir=over", "hydra.sweeper.n_trials=2"]
    assert command(folder, monkeypatch, *JOB, *words) == 85
    assert [(row["state"], row["reason"]) for row in rows(folder / "over")] == [("requeue", "trainer.max_time")] * 2
    assert "best_value: 0.5" in (folder / "over/optimization_results.yaml").read_text()


def test_optuna_searches_with_two_ranks_per_job(folder: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    result = python(
        "-m", "bitnet_train", *JOB, *TWO_RANKS, "hparams_search=optuna", "run_dir=search", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.params={schedule.peak_lr: 'tag(log, interval(1e-4, 1e-2))'}", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    table = rows(folder / "search")
    assert [(row["job"], row["state"]) for row in table] == [("0", "done"), ("1", "done")]
    best = (folder / "search/optimization_results.yaml").read_text()
    assert str(min(row["objective"] for row in table)) in best
    rates = [metrics(folder / f"search/{job}")[2]["train/lr"] for job in (0, 1)]
    assert rates[0] != rates[1]


@pytest.mark.fault
def test_a_failed_trial_is_not_the_end_of_a_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code = command(
        folder, monkeypatch, *JOB, "hparams_search=optuna", "run_dir=nan", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.params=null", "seed=choice(0,1)", HARM,
    )  # fmt: skip
    table = rows(folder / "nan")
    assert code == 1
    assert [row["state"] for row in table] == ["done", "failed", "failed"]
    assert not [word for row in table for word in row["overrides"] if word.startswith("schedule.peak")]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.05)


@pytest.mark.fault
def test_a_slurm_job_at_its_time_limit_is_queued_again(folder: Path, tmp_path: Path) -> None:
    """Two jobs of an array, the first of which is warned while it trains."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    variables = environment() | install(tmp_path, "SIGUSR2")
    arguments = [*JOB, *SLOW, "launcher=slurm", "run_dir=cluster", "seed=0,1", "max_steps=8", "schedule.warmup_steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_train", *arguments], cwd=folder, env=variables, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    batches = folder / "cluster/0/batches"
    wait_for(lambda: (batches.exists() and batches.stat().st_size >= 4) or process.poll() is not None)
    (tmp_path / "limit-101").touch()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert [path.name for path in tmp_path.glob("requeued-*")] == ["requeued-101"]
    assert [(row["job"], row["state"], row["step"]) for row in rows(folder / "cluster")] == [
        ("0", "done", 8),
        ("1", "done", 8),
    ]
    losses = [event["step"] for event in metrics(folder / "cluster/0") if "train/loss" in event]
    assert losses == list(range(1, 9))


SCRIPT = """#!/bin/bash
#SBATCH --ntasks-per-node=2
#SBATCH --signal=USR1@180
srun {python} -m bitnet_train {arguments} run_dir=batch
if [ $? -eq 85 ]; then scontrol requeue $SLURM_JOB_ID; fi
"""


@pytest.mark.fault
def test_a_batch_script_with_srun_is_queued_again(folder: Path, tmp_path: Path) -> None:
    variables = environment() | install(tmp_path, "SIGUSR1")
    arguments = " ".join([*JOB, *SLOW, *TWO_RANKS, "max_steps=8", "schedule.warmup_steps=1"])
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT.format(python=sys.executable, arguments=arguments))
    subprocess.run([tmp_path / "bin/sbatch", script], cwd=folder, env=variables, check=True)
    status, batches = folder / "batch/status.json", folder / "batch/batches"
    wait_for(lambda: batches.exists() and batches.stat().st_size >= 2)
    (tmp_path / "limit-100").touch()
    wait_for(lambda: json.loads(status.read_text())["state"] == "done")
    assert (tmp_path / "requeued-100").exists()
    assert [event["step"] for event in metrics(folder / "batch") if "train/loss" in event] == list(range(1, 9))


def test_the_exit_code_of_a_sweep_is_that_of_the_job_that_matters_most() -> None:
    def code(*codes: int) -> int:
        return sweep.exit_code([sweep.Row(str(i), [], "", None, None, c, "") for i, c in enumerate(codes)])

    assert (code(), code(0, 0), code(0, 2), code(2, 1, 0), code(1, 85, 2)) == (0, 0, 2, 1, 85)


def test_only_the_warning_of_a_time_limit_queues_a_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in install(tmp_path, "SIGUSR1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    sweep.requeue("SIGUSR2")  # a batch script of someone's own
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for reason in ("SIGTERM", "STOP file"):
        sweep.requeue(reason)
    assert not list(tmp_path.glob("requeue-*"))
    sweep.requeue("SIGUSR2")
    assert (tmp_path / "requeue-7").exists()


@pytest.mark.fault
def test_jobs_whose_folders_vanished_have_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "started", [(tmp_path / "sweep", "val/loss")])
    sweep.write_outcome(tmp_path / "sweep/0", 1, "the run directory has vanished")
    assert sweep.conclude([tmp_path / "sweep/0", tmp_path / "sweep/1"]) == 1
    assert [(row["state"], row["reason"]) for row in rows(tmp_path / "sweep")] == [
        ("failed", "the run directory has vanished"),
        ("failed", "did not end"),
    ]
    assert "did not end" in capsys.readouterr().out
