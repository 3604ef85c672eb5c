"""Checkpoints that are whole or absent: written under another name, sealed with a manifest, then renamed.

    checkpoints/step-000100/state.pt        weights, optimizer, step, tokens, RNG: plain containers (weights_only)
    checkpoints/step-000100/manifest.json   size and sha256 of every file, written last
    checkpoints/last                        a link to the newest

The order is that of `formats.atomic`: files, fsync, rename, fsync of the parent. A kill at any moment leaves the
earlier checkpoints as they were. Resuming takes the highest step whose manifest verifies, and renames one that does
not to `.bad`.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_folder

STATE, MANIFEST, LAST = "state.pt", "manifest.json", "last"
_PREFIX, _TEMPORARY, _BAD, _OLD = "step-", ".tmp", ".bad", ".old"

log = logging.getLogger(__name__)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def save(folder: Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Commits the state as `folder/step-<step>` and removes all but the newest `keep_last` checkpoints."""
    target = folder / f"{_PREFIX}{step:06d}"
    if target.exists():  # the run went on from it; the same step of the same run is the same state
        return target
    with atomic_folder(target) as temporary:
        torch.save(state, temporary / STATE)
        (temporary / MANIFEST).write_text(json.dumps({STATE: _entry(temporary / STATE)}))
    _link_last(target)
    for old in _steps(folder)[:-keep_last] if keep_last > 0 else []:
        shutil.rmtree(old)
    return target


def _link_last(target: Path) -> None:
    link = target.parent / f".{LAST}{_TEMPORARY}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.parent / LAST)


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def verifies(checkpoint: Path) -> bool:
    """True if every file that the manifest names is there with its size and hash."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return bool(manifest) and all(_entry(checkpoint / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint. Leftovers of killed saves are removed, damaged checkpoints renamed to `.bad`."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
    for checkpoint in reversed(_steps(folder)):
        if verifies(checkpoint):
            return checkpoint
        log.warning("%s is damaged and set aside as %s", checkpoint, _set_aside(checkpoint, _BAD).name)
    return None


def _set_aside(checkpoint: Path, suffix: str) -> Path:
    aside = checkpoint.with_name(f"{checkpoint.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def set_aside_after(folder: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `.old`: a run that starts before them is not to end in them."""
    for checkpoint in _steps(folder):
        if int(checkpoint.name.removeprefix(_PREFIX)) > step:
            _set_aside(checkpoint, _OLD)


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` asks for: auto (the newest in `folder`, or none), never, or a path.

    Raises:
        UserError: the path is no checkpoint, or it is damaged.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest(folder)
    checkpoint = Path(resume)
    if not (checkpoint / STATE).is_file():
        raise UserError(f"resume={resume}: no checkpoint there (a folder with {STATE}); give one, auto or never")
    if not verifies(checkpoint):
        raise UserError(f"resume={resume}: the checkpoint is damaged ({MANIFEST} does not verify); use resume=auto")
    return checkpoint


def load(checkpoint: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU.

    Raises:
        UserError: it was made by a run whose `identity` (model, order of the data, batch) was another.
    """
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
    differences = [
        f"{key}: {state['identity'].get(key)} there, {value} now"
        for key, value in identity.items()
        if state["identity"].get(key) != value
    ]
    if differences:
        raise UserError(
            f"{checkpoint}: made by another run ({'; '.join(differences)}); use another run_dir or resume=never"
        )
    return state
