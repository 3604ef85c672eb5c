"""Many runs in one group of processes, and all groups from one process: importing takes seconds, a small run one.

python -m tests.group    for every line [COUNT, [JOB, ...]] that it reads it forks COUNT ranks, which do the jobs in the
                         folder that it was started in, and prints their exit codes

A rank ends without the interpreter's own end, where gloo's threads abort now and then after all work is done. What a
job has left in its folder is what tests judge.
"""

import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from pathlib import Path
from subprocess import PIPE
from typing import Any, NoReturn

import lightning as L
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from bitnet_train import config as configuration
from bitnet_train.errors import RunFailed
from bitnet_train.formats.shards import mapped
from bitnet_train.training import ranks, worker
from bitnet_train.training.module import TrainingModule, tokens_of
from bitnet_train.training.run import run as run_training
from bitnet_train.training.sharding import whole
from tests.faults import limited
from tests.support import ROOT


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        run_dir: its directory.
        overrides: of its configuration.
        copy_of: the directory of an earlier run to begin with, without its result.
        without: checkpoints of this step and later ones are left out of the copy.
        fails: the run is to fail, and every rank leaves the reason in `failure-RANK`.
    """

    run_dir: str
    overrides: list[str] = field(default_factory=list)
    copy_of: str | None = None
    without: int | None = None
    fails: bool = False

    def prepare(self) -> None:
        """Makes the copy; one rank calls it."""
        if self.copy_of is None:
            return
        shutil.copytree(
            self.copy_of, self.run_dir, symlinks=True, ignore=shutil.ignore_patterns("model", "rows-*", "digest")
        )
        for checkpoint in Path(self.run_dir, "checkpoints").glob("step-*"):
            if self.without is not None and int(checkpoint.name.removeprefix("step-")) >= self.without:
                shutil.rmtree(checkpoint)


class Record(L.Callback):
    """What a run begins with and reads, in its directory: `digest` of all weights and moments, `rows-RANK`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        digest = hashlib.sha256()

        def add(path: str, leaf: Any) -> None:
            if isinstance(leaf, Tensor):
                digest.update(path.encode() + whole(leaf).cpu().numpy().tobytes())

        mapped([pl_module.model.state_dict(), trainer.optimizers[0].state_dict()], add)
        if ranks.is_first():
            Path(trainer.default_root_dir, "digest").write_text(digest.hexdigest())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step, and the first ids of every row."""
        assert isinstance(pl_module, TrainingModule)
        with Path(trainer.default_root_dir, f"rows-{ranks.rank()}").open("a") as file:
            file.write(json.dumps([pl_module.step, tokens_of(batch).input_ids[:, :24].tolist()]) + "\n")


class Groups:
    """Groups of ranks in a folder, one after the other; a context manager that leaves no process.

    Args:
        folder: where they work; rank N of the last group writes `log-N`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAUNCHER_PID": str(os.getpid())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.group"], env=environment, cwd=folder, stdin=PIPE, stdout=PIPE, text=True
        )

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def do(self, count: int, jobs: Sequence[Job]) -> None:
        """Does the jobs with `count` ranks."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([count, [asdict(job) for job in jobs]]), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        logs = [self.folder / f"log-{rank}" for rank in range(count)]
        assert codes == [0] * count, "\n".join(log.read_text()[-4000:] for log in logs)


def run(job: Job, config: DictConfig) -> None:
    """A job in this process, which may be a rank."""
    ranks.on_first(job.prepare)
    Path(job.run_dir).mkdir(exist_ok=True)
    try:
        with limited(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY):
            run_training(configuration.run_config(config), config, Path(job.run_dir))
    except RunFailed as failure:
        if not job.fails:
            raise
        Path(job.run_dir, f"failure-{ranks.rank()}").write_text(str(failure))


def _group(count: int, jobs: Sequence[Job]) -> list[int]:
    """Does the jobs in forks of this process; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["LAUNCHER_PID"] = str(os.getpid())
    with initialize_config_dir(str(configuration.CONF_DIR), version_base="1.3"):
        configs = [compose("train", [*job.overrides, f"run_dir={job.run_dir}"]) for job in jobs]
    pids = [os.fork() or _rank(rank, count, port, jobs, configs) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _rank(rank: int, count: int, port: int, jobs: Sequence[Job], configs: Sequence[DictConfig]) -> NoReturn:
    """A rank of several; a process that stands alone is none."""
    worker.die_with_the_parent()
    if count > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
    log = os.open(f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        with ranks.joined(600.0):
            for job, config in zip(jobs, configs, strict=True):
                print("JOB", job.run_dir, flush=True)
                run(job, config)
    except BaseException:
        traceback.print_exc()
        worker.leave(1)
    worker.leave(0)


if __name__ == "__main__":
    worker.die_with_the_parent()
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]  # a minute less
    configuration.register()
    for line in sys.stdin:
        count, jobs = json.loads(line)
        print(json.dumps(_group(count, [Job(**job) for job in jobs])), flush=True)
