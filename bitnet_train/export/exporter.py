"""The export: checks, then writes, then reads back."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitnet_train.errors import UserError
from bitnet_train.export.card import model_card
from bitnet_train.export.folders import write_folder
from bitnet_train.export.gguf import write_gguf_model
from bitnet_train.export.readback import Verification, readback
from bitnet_train.export.source import Source, open_source
from bitnet_train.export.targets import Target, check
from bitnet_train.formats.hf_folder import CONFIG
from bitnet_train.formats.parts import nothing
from bitnet_train.formats.safetensors_file import MAX_SHARD_BYTES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote: a file or folder, its size, what the user should know of it, how it compares; its card."""

    path: Path
    bytes: int
    notes: tuple[str, ...]
    verification: Verification | None
    card: str = ""


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
        force: replaces an earlier export at `target`.
        quantize: takes the weights of a dense folder for masters.
        tokenizer: a folder with tokenizer.json, in place of the model's own.
        name: what to call the model; that of the run or folder if absent.
        licence: SPDX identifier; that of the source's model card if absent.

    Raises:
        UserError: the source is no model that this format can hold, or the target exists. Nothing is left behind.
        OSError: the disk is full, or another fault of writing. Nothing is left behind.
    """
    model = open_source(source, quantize=quantize, tokenizer=tokenizer)
    model = replace(model, name=name or model.name, licence=licence or model.licence)
    variants = {"gguf": type, "safetensors": linear_class, "master": ""}
    goal = Target(format, variants[format])
    check(model, goal)
    _check_path(model, target, format, force)
    with readback(model) as reading:
        trained, written = (reading.source, reading.written) if verify else (model, nothing)
        if format == "gguf":
            write_gguf_model(trained, target, type, written)
        else:
            write_folder(trained, target, goal, _folder_dtype(model, format, dtype), max_shard_bytes, written)
        verification = reading.result() if verify else None
    size = size_of(target)
    card = model_card(model, goal, target.name, size)
    return ExportResult(target, size, _notes(model, goal, dtype), verification, card)


def size_of(path: Path) -> int:
    """The bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _check_path(model: Source, target: Path, format: str, force: bool) -> None:
    source, resolved = model.path.resolve(), target.resolve()
    if resolved in (source, *source.parents):
        raise UserError(f"{target}: must not be the model that is exported, or contain it; give another name")
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target}: must not exist yet; give another name, or --force to replace it")
    if not (_is_gguf(target) if format == "gguf" else (target / CONFIG).is_file()):
        raise UserError(
            f"{target}: --force replaces only a model of the same format, and this is none; give another name"
        )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _folder_dtype(model: Source, format: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    return torch.bfloat16 if format == "safetensors" else _stored_dtype(model)


def _stored_dtype(model: Source) -> torch.dtype:
    return model.weights.dtype("model.embed_tokens.weight")


def _notes(model: Source, target: Target, dtype: str | None) -> tuple[str, ...]:
    """What the user should know although nothing is wrong."""
    if target.format == "gguf" and not model.tokenizer.begins_with_bos and model.tokenizer.bos_id is not None:
        return ("runtimes put no BOS in front of a text, as the chat template writes none (add_bos_token is false)",)
    if target.format == "master" and dtype == "bfloat16" and _stored_dtype(model) == torch.float32:
        return ("masters rounded to bfloat16 quantise to other codes here and there; --dtype float32 keeps every code",)
    return ()
