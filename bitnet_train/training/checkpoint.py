"""Checkpoints that are whole or absent: written under another name, sealed with a manifest, then renamed.

    checkpoints/step-000100/state.pt        weights, optimizer, step, tokens, RNG: plain containers (weights_only);
                                            sharded tensors lie in files of their own beside it (`shards`)
    checkpoints/step-000100/metrics.json    the validation loss of this step, where one was measured
    checkpoints/step-000100/manifest.json   size and sha256 of every file, written last
    checkpoints/last, best                  lead to the newest, and to the one with the lowest validation loss (`link`)

The order is that of `formats.atomic`: files, fsync, rename, fsync of the parent. A kill at any moment leaves the
earlier checkpoints as they were. Resuming takes the highest step whose manifest verifies, and renames one that does
not to `.bad`.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_folder, sweep
from bitnet_train.formats.link import followed, point
from bitnet_train.formats.state_file import STATE, RunState, read_state

METRICS, MANIFEST, LAST, BEST = "metrics.json", "manifest.json", "last", "best"
LOSS = "val/loss"
NEVER_ALLOWED = ("model", "tokenizer", "optimizer")  # their state does not fit another one
_PREFIX, _BAD, _OLD = "step-", ".bad", ".old"

log = logging.getLogger(__name__)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{_PREFIX}{step:06d}"


def save(
    folder: Path, step: int, state: dict[str, Any], keep_last: int, keep_best: int = 0, loss: float | None = None
) -> Path:
    """Commits the state as `folder/step-<step>` and removes what need not be kept.

    Args:
        keep_last: how many of the newest are kept; 0 keeps all.
        keep_best: how many of those with the lowest loss are kept beside them.
        loss: the validation loss of this step, if it was measured.

    Raises:
        OSError: the disk did not take it; what was there before is untouched.
    """
    target = folder_of(folder, step)
    if not target.exists():  # where it is, the run went on from it; the same step of the same run is the same state
        with committed(target, state, keep_last, keep_best, loss):
            pass
    return target


@contextmanager
def committed(
    target: Path, state: dict[str, Any], keep_last: int, keep_best: int = 0, loss: float | None = None
) -> Iterator[Path]:
    """Yields the folder that becomes the checkpoint when the block ends; others may write into it. See `save`."""
    with atomic_folder(target) as temporary:
        _write_state(temporary / STATE, state)
        if loss is not None:
            (temporary / METRICS).write_text(json.dumps({LOSS: loss}))
        yield temporary
        seal(temporary)
    retain(target, keep_last, keep_best)


def seal(folder: Path) -> None:
    """Writes the manifest of all files in a folder."""
    entries = {file.name: _entry(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(entries))


def retain(newest: Path, keep_last: int, keep_best: int = 0) -> None:
    """Sets the names of a new checkpoint's folder, and removes from it what need not be kept; see `save`."""
    folder = newest.parent
    best = _best(folder)[:keep_best]
    for link, target in {LAST: newest, **({BEST: best[0]} if best else {})}.items():
        with _told():
            point(folder / link, target.name)
    for old in _steps(folder)[:-keep_last] if keep_last > 0 else []:
        if old not in best:
            with _told():
                shutil.rmtree(old)


@contextmanager
def _told() -> Iterator[None]:
    """The checkpoint itself is written: what the disk refuses around it is a warning, but for what is gone already."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s: %s; the new checkpoint is whole", error.filename, error.strerror)


def settle(folder: Path, keep_last: int, keep_best: int) -> None:
    """Does what is left to do of a save whose process was killed after the rename: links and removals."""
    found = _steps(folder)
    if found:
        retain(found[-1], keep_last, keep_best)


def _write_state(file: Path, state: dict[str, Any]) -> None:
    with file.open("wb") as stream, refusals(file):
        torch.save(state, stream)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What a stream refuses in the block, torch reports as a RuntimeError of its own.

    Raises:
        OSError: the refusal.
    """
    try:
        yield
    except RuntimeError as error:
        refused = error.__context__
        if not isinstance(refused, OSError):
            refused = OSError(errno.EIO, str(error).splitlines()[0], str(path))
        raise refused from None


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _best(folder: Path) -> list[Path]:
    """The checkpoints with a validation loss that is a number, the lowest first; of equals the older."""
    losses = {path: loss for path in _steps(folder) if (loss := _loss_of(path)) == loss and loss is not None}
    return sorted(losses, key=lambda path: losses[path])


def _loss_of(checkpoint: Path) -> float | None:
    try:
        return float(json.loads((checkpoint / METRICS).read_text())[LOSS])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verifies(checkpoint: Path) -> bool:
    """True if every file that the manifest names is there with its size and hash."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return STATE in manifest and all(_entry(checkpoint / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint. Leftovers of killed saves are removed, damaged checkpoints renamed to `.bad`."""
    sweep(folder)
    for checkpoint in reversed(_steps(folder)):
        if verifies(checkpoint):
            return checkpoint
        with suppress(FileNotFoundError):  # somebody removes it meanwhile
            log.warning("%s is damaged and set aside as %s", checkpoint, _set_aside(checkpoint, _BAD).name)
    return None


def _set_aside(checkpoint: Path, suffix: str) -> Path:
    aside = checkpoint.with_name(f"{checkpoint.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def set_aside_after(folder: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `.old`: a run that starts before them is not to end in them."""
    for checkpoint in _steps(folder):
        if step_of(checkpoint) > step:
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
    checkpoint = followed(Path(resume))
    if not (checkpoint / MANIFEST).is_file() and not (checkpoint / STATE).is_file():
        raise UserError(f"resume={resume}: no checkpoint there (a folder with {STATE}); give one, auto or never")
    if not verifies(checkpoint):
        raise UserError(f"resume={resume}: the checkpoint is damaged ({MANIFEST} does not verify); use resume=auto")
    return checkpoint


def load(checkpoint: Path, identity: dict[str, Any], allowed: Sequence[str] = ()) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU.

    Args:
        identity: what the run that goes on is: model, order of the data, batch.
        allowed: names in it that may differ.

    Raises:
        UserError: it was made by another run, cannot be read, or holds more than plain containers.
    """
    _check_allowed(allowed, identity)
    state = read_state(checkpoint, RunState)
    differences = [
        f"{key}: {state['identity'].get(key)} there, {value} now"
        for key, value in identity.items()
        if state["identity"].get(key) != value and key not in allowed
    ]
    if differences:
        raise UserError(
            f"{checkpoint}: made by another run ({'; '.join(differences)}); use another run_dir or resume=never, or "
            f"name in resume_allow=[...] what may differ (all but {', '.join(NEVER_ALLOWED)})"
        )
    return state


def _check_allowed(allowed: Sequence[str], identity: dict[str, Any]) -> None:
    possible = [name for name in identity if name not in NEVER_ALLOWED]
    for name in allowed:
        if name not in possible:
            raise UserError(
                f"resume_allow must name some of {', '.join(possible)}, got {name!r}; to train on with another model, "
                "tokenizer or optimizer start anew from the weights: init_from=RUN_DIR"
            )
