"""A sweep: what each job leaves in its folder, and the table that is made of it at the end.

    run_dir/0/.hydra/overrides.yaml    Hydra's: the values that this job tries
    run_dir/0/status.json              the run's: how far it is
    run_dir/0/outcome.json             how the job ended, with the exit code that it would have had alone
    run_dir/sweep.json                 one row per job: number, overrides, state, step, objective, reason

The rows come from files, so that they are the same for jobs of this process, of a SLURM cluster and of an earlier start
of the same sweep.
"""

import json
import logging
import math
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bitnet_train.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER_ERROR, UserError, printable
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.json_file import read_json
from bitnet_train.formats.metrics import read_events
from bitnet_train.training.status import read_status

log = logging.getLogger(__name__)

_OUTCOME, _TABLE = "outcome.json", "sweep.json"
_BY_SEVERITY = (EXIT_REQUEUE, EXIT_FAILURE, EXIT_USER_ERROR)  # a sweep that was stopped is to be started again


@dataclass(frozen=True)
class Row:
    """A job of a sweep.

    Attributes:
        job: the name of its folder: its number, from 0.
        objective: the last value of the metric that counts.
        code: the exit code that it would have had alone.
    """

    job: str
    overrides: list[str]
    state: str
    step: int | None
    objective: float | None
    code: int
    reason: str


class _Outcome(TypedDict):
    code: int
    reason: str


def write_outcome(run_dir: Path, code: int, reason: str) -> None:
    """How a job ended. A job whose folder cannot be written does not end the sweep."""
    _write(run_dir / _OUTCOME, {"code": code, "reason": reason})


def _write(file: Path, value: object) -> None:
    try:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(value, indent=1))
    except (OSError, UserError) as error:
        log.warning("%s cannot be written (%s)", file, error)


def last_value(run_dir: Path, metric: str) -> float | None:
    """The newest finite value of a metric of the run, if there is one."""
    try:
        events = read_events(run_dir)
    except UserError as error:
        log.warning("%s", error)
        return None
    values = [event[metric] for event in events if metric in event]
    return values[-1] if values and math.isfinite(values[-1]) else None


class Start(Callback):
    """Hydra's callback that says where a sweep is at work: its rows are collected however it ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes the folder, and the metric that the table shows."""
        started.append((Path(config.hydra.sweep.dir), config.objective))


started: list[tuple[Path, str]] = []  # the sweep of this process


def conclude(run_dirs: list[Path]) -> int:
    """Prints and writes the table of the sweep, and gives the exit code for it.

    Args:
        run_dirs: jobs that this process ran; those that others ran are found in the folder of the sweep.
    """
    folder, metric = started[-1]
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / ".hydra").is_dir()]
    folders = {path.resolve() for path in [*found, *run_dirs]}
    rows = [_row(path, metric) for path in sorted(folders, key=lambda path: (len(path.name), path.name))]
    _write(folder / _TABLE, [asdict(row) for row in rows])
    print(printable(format_table(rows, metric)))
    return exit_code(rows)


def _row(folder: Path, metric: str) -> Row:
    """A job without an outcome was killed, or is still at work."""
    status = read_status(folder)
    try:
        outcome = read_json(folder / _OUTCOME, _Outcome)
    except UserError:
        outcome = {"code": EXIT_FAILURE, "reason": "did not end"}
    state = {0: "done", EXIT_REQUEUE: "requeue"}.get(outcome["code"], "failed")
    return Row(
        folder.name,
        _overrides(folder),
        state,
        status["step"],
        last_value(folder, metric),
        outcome["code"],
        outcome["reason"],
    )


def _overrides(folder: Path) -> list[str]:
    """What a job tried; nothing is known of one whose folder has vanished."""
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(folder / ".hydra/overrides.yaml"))
    except FileNotFoundError:
        return []
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def format_table(rows: list[Row], metric: str) -> str:
    """The table for people. Only overrides in which the jobs differ are shown."""
    common = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    cells = [["job", "state", "step", metric, "overrides", "reason"]]
    for row in rows:
        own = " ".join(override for override in row.overrides if override not in common)
        objective = "-" if row.objective is None else f"{row.objective:.4f}"
        cells.append([row.job, row.state, "-" if row.step is None else str(row.step), objective, own, row.reason])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def exit_code(rows: list[Row]) -> int:
    """0 if all jobs are done, else that of the job that matters most."""
    codes = {row.code for row in rows}
    return next((code for code in _BY_SEVERITY if code in codes), 0)


def requeue(reason: str) -> None:
    """Queues a job of `launcher=slurm` again if the scheduler's warning of its time limit has stopped it.

    A stop of another kind (a file, scancel's SIGTERM) is meant to last, and a preempted job is queued by SLURM itself.
    """
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and reason.startswith("SIGUSR") and first:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
