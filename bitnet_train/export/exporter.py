"""The export: checks, then writes, then reads back; the result has its name when all of it is as it was trained."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitnet_train.errors import UserError
from bitnet_train.export.accounts import accounts, notes
from bitnet_train.export.card import model_card
from bitnet_train.export.folders import write_folder
from bitnet_train.export.gguf import write_gguf_model
from bitnet_train.export.readback import NotVerifiedError, Readback, Verification, readback
from bitnet_train.export.runtimes import Report
from bitnet_train.export.source import Source, open_source
from bitnet_train.export.targets import Target, check
from bitnet_train.formats.gguf_file import is_gguf
from bitnet_train.formats.hf_folder import CONFIG
from bitnet_train.formats.parts import nothing
from bitnet_train.formats.safetensors_file import MAX_SHARD_BYTES

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_ ()-]{0,99}")  # of SPDX and of the hub, such as llama3.1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Examine = Callable[[Source, Path], Iterable[Report]]


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        path: the file or folder.
        bytes: its size.
        notes: what the user should know of it.
        verification: how it compares, read back; None where that was left out.
        card: its model card.
        accounts: what became of the source's tensors and fields, a line each.
        reports: what the runtimes compute with it.
    """

    path: Path
    bytes: int
    notes: tuple[str, ...]
    verification: Verification | None
    card: str = ""
    accounts: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()


def export(
    source: Path,
    target: Path,
    *,
    format: str = "safetensors",
    type: str = "i2_s",
    linear_class: str = "autobitlinear",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    examine: Examine | None = None,
    force: bool = False,
    quantize: bool = False,
    tokenizer: Path | None = None,
    name: str | None = None,
    licence: str | None = None,
) -> ExportResult:
    """Writes a model in another format.

    Args:
        source: a run directory, a checkpoint of one, an HF folder or a GGUF file; see `source`.
        target: the folder, or for GGUF the file, to write.
        format: one of `targets.FORMATS`.
        type: one of `targets.GGUF_TYPES`, for GGUF only.
        linear_class: one of `hf_folder.LINEAR_CLASSES`, for packed safetensors only.
        dtype: one of `DTYPES`, for folders only. Default: bfloat16 for a packed folder, that of the source for masters.
        max_shard_bytes: size at which the weights of a folder are cut into several files.
        verify: reads the result back and compares it with the source.
        examine: looks at the result before it has its name, such as `runtimes.compare`.
        force: replaces an earlier export at `target`.
        quantize: takes the weights of a dense folder for masters.
        tokenizer: a folder with tokenizer.json, in place of the model's own.
        name: what to call the model; that of the run or folder if absent.
        licence: SPDX identifier; that of the source's model card if absent.

    Raises:
        UserError: the source is no model that this format can hold, or the target exists. Nothing is left behind.
        NotVerifiedError: what was written is not what was trained. Nothing is left behind.
        OSError: the disk is full, or another fault of writing. Nothing is left behind.
    """
    model = open_source(source, quantize=quantize, tokenizer=tokenizer)
    model = replace(model, name=_printable(name or model.name), licence=licence or model.licence)
    if not model.name:
        raise UserError(f"--name must hold a letter, got {name!r}; leave it out")
    variants = {"gguf": type, "safetensors": linear_class, "master": ""}
    goal = Target(format, variants[format])
    _check_licence(model)
    check(model, goal)
    _check_path(model, target, format, force)
    model_card(model, goal, target.name, 0)  # what it is made of is read before anything is written
    with readback(model) as reading:
        look = _Look(model, target, reading if verify else None, examine)
        trained, written = (reading.source, reading.written) if verify else (model, nothing)
        if format == "gguf":
            write_gguf_model(trained, target, type, written, look.at)
        else:
            write_folder(trained, target, goal, _folder_dtype(model, format, dtype), max_shard_bytes, written, look.at)
    size = size_of(target)
    return ExportResult(
        target,
        size,
        notes(model, goal, _rounds(model, goal, dtype), reading.zeros),
        look.verification,
        model_card(model, goal, target.name, size),
        accounts(model, goal),
        look.reports,
    )


@dataclass
class _Look:
    """Looks at an export under its temporary name, and keeps what was found."""

    model: Source
    target: Path
    reading: Readback | None
    examine: Examine | None
    verification: Verification | None = None
    reports: tuple[Report, ...] = ()

    def at(self, path: Path) -> None:
        """Raises NotVerifiedError where the export is not what was trained."""
        if self.reading is not None:
            self.verification = self.reading.result()
            if self.verification.mismatches:
                raise NotVerifiedError(f"{self.target}: {self.verification}; it was not kept")
        if self.examine is not None:
            self.reports = tuple(self.examine(self.model, path))
        differing = [line.text for report in self.reports for line in report.lines() if not line.agrees]
        if differing:
            raise NotVerifiedError("; ".join(differing) + f"; {self.target} was not kept")


def size_of(path: Path) -> int:
    """The bytes of a file, or of the files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _printable(name: str) -> str:
    """The name in one line, without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in name).split())


def _check_licence(model: Source) -> None:
    if model.licence is not None and not _LICENCE.fullmatch(model.licence):
        raise UserError(
            f"{model.path}: the licence must be an identifier such as mit or apache-2.0, got {model.licence!r}; give "
            "--license SPDX"
        )


def _check_path(model: Source, target: Path, format: str, force: bool) -> None:
    source, resolved = model.path.resolve(), target.resolve()
    if resolved in (source, *source.parents):
        raise UserError(f"{target}: must not be the model that is exported, or contain it; give another name")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise UserError(f"{target}: must not exist yet; give another name, or --force to replace it")
    if not (is_gguf(target) if format == "gguf" else (target / CONFIG).is_file()):
        raise UserError(
            f"{target}: --force replaces only a model of the same format, and this is none; give another name"
        )


def _folder_dtype(model: Source, format: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    return torch.bfloat16 if format == "safetensors" else _stored_dtype(model)


def _stored_dtype(model: Source) -> torch.dtype:
    """The dtype that holds every tensor: masters may be float32 beside an embedding of bfloat16."""
    dtypes = {model.weights.dtype(name) for name in model.shapes}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _rounds(model: Source, target: Target, dtype: str | None) -> bool:
    return target.format == "master" and dtype == "bfloat16" and _stored_dtype(model) == torch.float32
