"""status.json: how far a run is, and how it ended. Schedulers, sweeps and people read it."""

import json
import logging
from pathlib import Path
from typing import Any, TypedDict

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import read_json

log = logging.getLogger(__name__)


class Status(TypedDict):
    """The fields of the file."""

    state: str
    step: int | None
    reason: str


def write_status(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """status.json: running, done, requeue or failed."""
    temporary = run_dir / ".status.json.tmp"
    temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason}))
    temporary.replace(run_dir / "status.json")


def report_status(run_dir: Path, state: str, step: int, reason: str = "") -> None:
    """The same, where there are worse things to tell than that it could not be written."""
    try:
        write_status(run_dir, state, step, reason)
    except OSError as error:
        log.warning("status.json cannot be written (%s)", error)


def read_status(run_dir: Path) -> dict[str, Any]:
    """What was written last; a run that has not come to its first step has state "failed" and no step."""
    try:
        return read_json(run_dir / "status.json", Status)
    except UserError:
        return {"state": "failed", "step": None, "reason": "not started"}
