"""The export: checks, then writes, then reads back; the result has its name when all of it is as it was trained."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bitnet_train.errors import UserError
from bitnet_train.export.card import model_card
from bitnet_train.export.folders import write_folder
from bitnet_train.export.gguf import write_gguf_model
from bitnet_train.export.readback import NotVerifiedError, Readback, Verification, readback
from bitnet_train.export.runtimes import Report
from bitnet_train.export.source import Source, open_source
from bitnet_train.export.targets import Target, check
from bitnet_train.formats.gguf_file import is_gguf
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.hf_folder import CONFIG, GENERATION_CONFIG
from bitnet_train.formats.parts import nothing
from bitnet_train.formats.safetensors_file import MAX_SHARD_BYTES
from bitnet_train.formats.tokenizer_files import CHAT_TEMPLATE, MORE_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_ ()-]{0,99}")  # of SPDX and of the hub, such as llama3.1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Examine = Callable[[Source, Path], Iterable[Report]]


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

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
        _notes(model, goal, dtype, reading.zeros),
        look.verification,
        model_card(model, goal, target.name, size),
        _accounts(model, goal),
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


def _notes(model: Source, target: Target, dtype: str | None, zeros: Sequence[str]) -> tuple[str, ...]:
    """What the user should know although nothing is wrong."""
    notes = []
    if target.format == "gguf" and not model.tokenizer.begins_with_bos and model.tokenizer.bos_id is not None:
        notes.append(
            "runtimes put no BOS in front of a text, as the chat template writes none (add_bos_token is false)"
        )
    if target.format == "master" and dtype == "bfloat16" and _stored_dtype(model) == torch.float32:
        notes.append(
            "masters rounded to bfloat16 quantise to other codes here and there; --dtype float32 keeps every code"
        )
    if zeros:
        notes.append(f"{len(zeros)} matrices are all zero: {', '.join(sorted(zeros))}")
    files = model.tokenizer.files()
    unread = [name for name, state in files.items() if state == "copied unread"]
    if unread and target.format != "gguf":
        notes.append(f"there is no tokenizer.json; {', '.join(unread)} was copied unread")
    if not files and not model.tokenizer.generation_ids() and target.format != "gguf":
        notes.append("the model has no tokenizer; --tokenizer DIR adds one")
    if files and not unread and target.format != "gguf":
        try:
            _ = model.trained_tokenizer
        except UserError as error:
            notes.append(f"the tokenizer was copied as it is: {error}")
    if left := [*_files_left_out(model, target), *_templates_left_out(model, target)]:
        notes.append(f"left out: {', '.join(left)}")
    return tuple(notes)


def _templates_left_out(model: Source, target: Target) -> list[str]:
    """GGUF has one chat template."""
    if target.format != "gguf" or isinstance(model.tokenizer, GGUFTokenizer):
        return []
    return [f"chat template {name}" for name in model.trained_tokenizer.chat_templates if name != "default"]


def _files_left_out(model: Source, target: Target) -> list[str]:
    """Files of the source's folder that are in no part of the export."""
    if not model.path.is_dir() or not (model.path / CONFIG).is_file():
        return []
    used = {CONFIG, GENERATION_CONFIG, "README.md"}
    if target.format != "gguf":
        used |= {name.split("/")[0] for name in model.tokenizer.files()}
    else:
        used |= {TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, MORE_TEMPLATES, "special_tokens_map.json"}
    weights = (".safetensors", ".safetensors.index.json")
    names = sorted(entry.name for entry in model.path.iterdir() if not entry.name.startswith("."))
    return [name for name in names if name not in used and not name.endswith(weights)]


def _accounts(model: Source, target: Target) -> tuple[str, ...]:
    """What became of every tensor and every field of the source."""
    count = len(model.shapes_found) - len(model.tensors_left_out)
    left = [f"{name} ({reason})" for name, reason in model.tensors_left_out.items()]
    tensors = f"tensors: {count} of {len(model.shapes_found)} used" + (f"; left out: {', '.join(left)}" if left else "")
    return tensors, *_fields(model, target), *_keys(model, target)


def _keys(model: Source, target: Target) -> list[str]:
    """Those of a GGUF file beside the ones that config.json came of."""
    if not isinstance(model.tokenizer, GGUFTokenizer):
        return []
    metadata = model.tokenizer.metadata
    known = {f"general.{key}" for key in _GENERAL}
    unused = [key for key in metadata if key.startswith("general.") and key not in known]
    unused += model.tokenizer.unread_keys() if target.format != "gguf" else []
    told = f"; left out: {', '.join(unused)}" if unused else ""
    return [f"keys: {len(metadata) - len(unused)} of {len(metadata)} used{told}"]


def _fields(model: Source, target: Target) -> list[str]:
    """GGUF has keys for what decides about the function; a folder has every field, but what names code to run."""
    lines = []
    files = {CONFIG: model.config_json, GENERATION_CONFIG: model.generation_config}
    for name, content in files.items():
        unused = sorted(key for key in content if not _is_used(key, name, model, target))
        unused += [f"quantization_config.{key}" for key in content.get("quantization_config", {}) if key not in _HOW]
        told = f"; left out: {', '.join(unused)}" if unused else ""
        used = sum(_is_used(key, name, model, target) for key in content)
        lines.append(f"{name}: {used} of {len(content)} fields used{told}")
    return lines


_DESCRIBING = ("architectures", "model_type", "quantization_config", "torch_dtype", "dtype", "transformers_version")
_HOW = ("quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm")
_GENERAL = ("architecture", "name", "license", "file_type", "quantization_version", "alignment")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_TRAINING = ("initializer_range", "attention_dropout")  # of the configuration, and nothing that a runtime computes
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _is_used(key: str, file: str, model: Source, target: Target) -> bool:
    if target.format != "gguf":
        return key != "auto_map"
    if file == GENERATION_CONFIG:
        return key in _IDS
    computed = {*asdict(model.config)} - {*_TRAINING}
    return key in computed or key in (*_DESCRIBING, *_ROPE, *_IDS)
