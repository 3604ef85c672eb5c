"""The three formats, each a list of tensors that are made one at a time while the file is written."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.export.readback import Verification, verify
from bitnet_train.export.source import ModelFolder, located
from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.formats.gguf_bitnet import ARCHITECTURE, gguf_name, model_metadata
from bitnet_train.formats.gguf_blocks import GGMLType, pack_float, pack_i2_s, tensor_bytes
from bitnet_train.formats.gguf_file import LazyBlocks, write_gguf
from bitnet_train.formats.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
    LazyTensor,
    read_json,
    write_json,
    write_safetensors,
)
from bitnet_train.formats.packing import pack_ternary, packed_shape

FORMATS = ("safetensors", "gguf", "master")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class GGUFTarget(NamedTuple):
    """What `--type` stands for: the types of the ternary matrices and of embedding and head, and general.file_type."""

    ternary: GGMLType
    embedding: GGMLType
    file_type: int


GGUF_TARGETS = {
    "i2_s": GGUFTarget(GGMLType.I2_S, GGMLType.F16, 40),
    "f16": GGUFTarget(GGMLType.F16, GGMLType.F16, 1),
    "bf16": GGUFTarget(GGMLType.BF16, GGMLType.BF16, 32),
    "f32": GGUFTarget(GGMLType.F32, GGMLType.F32, 0),
}

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [bitnet, 1.58-bit]
---
# {name}

A BitNet b1.58 model: {layers} layers of width {hidden}, ternary weights packed in 2 bits, int8 activations.
`pip install torch transformers accelerate`, then:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```
"""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote: a file or folder, its size, what the user should know of it, and how it compares."""

    path: Path
    bytes: int
    notes: tuple[str, ...]
    verification: Verification | None


def export(
    source: Path,
    target: Path,
    *,
    format: str = "safetensors",
    type: str = "i2_s",
    dtype: str | None = None,
    check: bool = False,
    force: bool = False,
) -> ExportResult:
    """Writes a model in another format.

    Args:
        source: a run directory or an HF folder; a packed one can become GGUF.
        target: the folder, or for GGUF the file, to write.
        format: one of `FORMATS`.
        type: one of `GGUF_TARGETS`, for GGUF only.
        dtype: one of `DTYPES`, for folders only. Default: bfloat16 for a packed folder, that of the source for masters.
        check: reads the result back and compares it with the source.
        force: replaces an earlier export at `target`.

    Raises:
        UserError: the source is no model that this format can hold, or the target exists. Nothing is left behind.
    """
    model = ModelFolder.open(source)
    _check_model(model, format)
    _check_target(model, target, format, force)
    if format == "gguf":
        _write_gguf(model, target, GGUF_TARGETS[type])
    else:
        _write_folder(model, target, format, _folder_dtype(model, format, dtype))
    files = target.iterdir() if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files)
    return ExportResult(target, size, _notes(model, format, dtype), verify(source, target) if check else None)


def _check_model(model: ModelFolder, format: str) -> None:
    """Refuses what the format cannot hold, or what its readers would compute wrongly."""
    path, config = model.path / CONFIG, model.config
    if model.kind == "packed" and format != "gguf":
        reason = "is packed already" if format == "safetensors" else "is packed, which cannot be turned into masters"
        raise UserError(f"{model.path}: {reason}; give the run directory or folder of master weights")
    if config.attention_bias and format != "master":
        # transformers multiplies the bias of a packed layer by the weight's scale; llama.cpp's graphs leave it out
        raise UserError(
            f"{path}: attention_bias must be false for {format}, whose readers do not add the biases, got true"
        )
    if config.hidden_act != "relu2" and format == "gguf":
        raise UserError(
            f"{path}: hidden_act must be relu2 for GGUF, whose architecture {ARCHITECTURE} computes no other, got "
            f"{config.hidden_act}; use --format safetensors"
        )


def _check_target(model: ModelFolder, target: Path, format: str, force: bool) -> None:
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


def _folder_dtype(model: ModelFolder, format: str, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    return torch.bfloat16 if format == "safetensors" else _stored_dtype(model)


def _stored_dtype(model: ModelFolder) -> torch.dtype:
    return model.folder.load("model.embed_tokens.weight").dtype


def _notes(model: ModelFolder, format: str, dtype: str | None) -> tuple[str, ...]:
    """What the user should know although nothing is wrong."""
    if format == "gguf" and not model.config.tie_word_embeddings:
        return ("bitnet.cpp computes the logits with the embedding, not with this model's head: use ik_llama.cpp",)
    if format == "master" and dtype == "bfloat16" and _stored_dtype(model) == torch.float32:
        return ("masters rounded to bfloat16 quantise to other codes here and there; --dtype float32 keeps every code",)
    return ()


def _write_folder(model: ModelFolder, target: Path, format: str, dtype: torch.dtype) -> None:
    """A packed folder or one of masters, with tokenizer, generation config and model card."""
    packed = format == "safetensors"
    tensors = _packed_tensors(model, dtype) if packed else {name: _cast(model, name, dtype) for name in model.shapes}
    with atomic_folder(target) as folder:
        write_json(folder / CONFIG, _config(model, dtype, "offline" if packed else "online"))
        write_json(folder / GENERATION_CONFIG, _generation_config(model))
        for name in (*TOKENIZER_FILES, *(() if packed else ("README.md",))):
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, folder / name)
        if packed:
            layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
            card = _CARD.format(name=target.name, layers=layers, hidden=hidden)
            (folder / "README.md").write_text(card, encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors)


def _packed_tensors(model: ModelFolder, dtype: torch.dtype) -> dict[str, LazyTensor]:
    tensors = {name: _cast(model, name, dtype) for name in model.shapes if name not in model.ternary_names}
    for name in model.ternary_names:
        with located(model.path, name):
            shape = packed_shape(model.shapes[name])
        tensors[name] = LazyTensor(torch.uint8, shape, partial(_packed_codes, model, name))
        tensors[f"{name}_scale"] = LazyTensor(dtype, (1,), partial(_packed_scale, model, name, dtype))
    return tensors


def _packed_codes(model: ModelFolder, name: str) -> Tensor:
    return pack_ternary(model.ternary(name).codes)


def _packed_scale(model: ModelFolder, name: str, dtype: torch.dtype) -> Tensor:
    return model.ternary(name).scale.to(dtype).reshape(1)


def _cast(model: ModelFolder, name: str, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(dtype, model.shapes[name], lambda: model.dense(name).to(dtype))


def _config(model: ModelFolder, dtype: torch.dtype, mode: str) -> dict[str, object]:
    """config.json of the folder: the source's, with what the weights now are, and the ids of the tokenizer."""
    ids = {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": model.tokenizer.eos_id}
    config = {name: id_ for name, id_ in ids.items() if id_ is not None} | model.folder.config
    config.pop("dtype", None)  # transformers 5's name of torch_dtype
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
    }
    return config


def _generation_config(model: ModelFolder) -> Mapping[str, object]:
    path = model.path / GENERATION_CONFIG
    return (read_json(path) if path.is_file() else {}) | model.tokenizer.generation_ids()


def _write_gguf(model: ModelFolder, target: Path, types: GGUFTarget) -> None:
    """One GGUF file, with the tokenizer in it."""
    name = (model.path.parent if model.path.name == "model" else model.path).resolve().name
    metadata = model_metadata(name, asdict(model.config), types.file_type) | model.tokenizer.gguf_metadata()
    write_gguf(target, ARCHITECTURE, metadata, {gguf_name(name): _blocks(model, name, types) for name in model.shapes})


def _blocks(model: ModelFolder, name: str, types: GGUFTarget) -> LazyBlocks:
    shape = model.shapes[name]
    ternary = name in model.ternary_names
    kind = types.ternary if ternary else types.embedding if len(shape) > 1 else GGMLType.F32
    with located(model.path, name):
        tensor_bytes(kind, shape)
    make: Callable[[ModelFolder, str, GGMLType], bytes] = _ternary_bytes if ternary else _dense_bytes
    return LazyBlocks(kind, shape, partial(make, model, name, kind))


def _ternary_bytes(model: ModelFolder, name: str, kind: GGMLType) -> bytes:
    codes, scale = model.ternary(name)
    if kind == GGMLType.I2_S:
        return pack_i2_s(codes, scale.item())
    with located(model.path, name):
        return pack_float(codes * scale.float(), kind)


def _dense_bytes(model: ModelFolder, name: str, kind: GGMLType) -> bytes:
    with located(model.path, name):
        return pack_float(model.dense(name), kind)
