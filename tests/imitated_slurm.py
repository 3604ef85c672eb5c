"""The commands of SLURM that a run meets, imitated on one machine: sbatch, srun, scontrol requeue, sacct.

    sbatch   runs the script in the background, once for each task of its array, and again each time it is requeued
    srun     starts --ntasks processes with the variables of a job step; when the file `limit-JOB` appears in the folder
             of $SLURM_IMITATION, it warns them with $SLURM_WARNING, as SLURM does before the time limit

`install` puts them on a PATH.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "sacct")


def install(folder: Path, warning: str) -> dict[str, str]:
    """Writes the executables into `folder` and returns the variables that make a program use them."""
    (folder / "bin").mkdir()
    for name in COMMANDS:
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        file.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "SLURM_IMITATION": str(folder), "SLURM_WARNING": warning}


def _state() -> Path:
    return Path(os.environ["SLURM_IMITATION"])


def _options(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE))


def sbatch(arguments: list[str]) -> None:
    """Job 100, or the array 100 of jobs 101, 102, ..."""
    script = Path(arguments[-1])
    options = _options(script)
    print("Submitted batch job 100", flush=True)
    last = re.match(r"0-(\d+)", options.get("array", ""))
    tasks = [{"SLURM_JOB_ID": "100"}]
    if last is not None:
        tasks = [
            {"SLURM_JOB_ID": str(101 + i), "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(i)}
            for i in range(int(last[1]) + 1)
        ]
    common = {"SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"), "SLURM_JOB_NAME": "train"}
    if os.fork() == 0:
        os.setsid()
        with (_state() / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            for task in tasks:
                _run(script, task | common | {"SLURM_NTASKS": common["SLURM_NTASKS_PER_NODE"]})
        os._exit(0)


def _run(script: Path, variables: dict[str, str]) -> None:
    again = _state() / f"requeue-{variables['SLURM_JOB_ID']}"
    while True:
        subprocess.run(["bash", script], env={**os.environ, **variables}, check=False)
        if not again.exists():
            return
        again.rename(again.with_name(again.name.replace("requeue", "requeued")))


def srun(arguments: list[str]) -> int:
    """The largest exit code of the tasks."""
    while arguments[0].startswith("--"):
        arguments = arguments[1:] if "=" in arguments[0] or arguments[0] == "--unbuffered" else arguments[2:]
    count = int(os.environ["SLURM_NTASKS"])
    common = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1"}
    tasks = [
        subprocess.Popen(arguments, env={**os.environ, **common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(count)
    ]
    limit = _state() / f"limit-{os.environ['SLURM_JOB_ID']}"
    while any(task.poll() is None for task in tasks):
        if limit.exists():
            limit.unlink()
            for task in tasks:
                task.send_signal(signal.Signals[os.environ["SLURM_WARNING"]])
        time.sleep(0.05)
    return max(abs(task.wait()) for task in tasks)


def scontrol(arguments: list[str]) -> None:
    """Only `scontrol requeue JOB`."""
    verb, job = arguments
    assert verb == "requeue", verb
    (_state() / f"requeue-{job}").touch()


def sacct(arguments: list[str]) -> None:
    """Nothing is known of any job; submitit then looks for its files."""
    print("JobID|State|NodeList")


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
