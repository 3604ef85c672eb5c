"""Many runs in one group of processes: starting a group costs ten seconds, a small run one.

python -m tests.group FOLDER    one rank: does the jobs in FOLDER/jobs.json in order, in FOLDER

A rank ends without the interpreter's own end, where gloo's threads abort now and then after all work is done. What a
job has left in its folder is what tests judge.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from bitnet_train.formats.shards import mapped
from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule, tokens_of
from bitnet_train.training.sharding import whole
from tests.support import ROOT


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        run_dir: its directory.
        overrides: of its configuration.
        copy_of: the directory of an earlier run to begin with, without its result.
        without: checkpoints of this step and later ones are left out of the copy.
    """

    run_dir: str
    overrides: list[str] = field(default_factory=list)
    copy_of: str | None = None
    without: int | None = None

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


def start(folder: Path, count: int, jobs: Sequence[Job], timeout: float = 600.0) -> None:
    """Does the jobs with `count` processes."""
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
    }
    command = [sys.executable, "-m", "tests.group", str(folder)]
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(count)]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log, cwd=folder
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0] * count, "\n".join(log.read()[-4000:] for log in logs)


def run(job: Job) -> None:
    """A job in this process, which may be a rank."""
    from hydra import compose, initialize_config_dir

    from bitnet_train import config as configuration
    from bitnet_train.training.run import run as run_training

    configuration.register()
    ranks.on_first(job.prepare)
    Path(job.run_dir).mkdir(exist_ok=True)
    with initialize_config_dir(str(configuration.CONF_DIR), version_base="1.3"):
        config = compose("train", [*job.overrides, f"run_dir={job.run_dir}"])
    run_training(configuration.run_config(config), config, Path(job.run_dir))


def _main(folder: Path) -> None:
    with ranks.joined(600.0):
        for job in json.loads((folder / "jobs.json").read_text()):
            print("JOB", job["run_dir"], flush=True)
            run(Job(**job))


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
