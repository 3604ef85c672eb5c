"""GGUF files: one file with the model, its tokenizer and its chat template."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from bitnet_train.export.source import Source
from bitnet_train.export.targets import GGUF_TYPES, GGUFTypes
from bitnet_train.formats.gguf_bitnet import ARCHITECTURES, gguf_name, model_metadata
from bitnet_train.formats.gguf_blocks import GGMLType, pack_float
from bitnet_train.formats.gguf_file import LazyBlocks, write_gguf
from bitnet_train.formats.gguf_ternary import TERNARY_TYPES, pack_ternary_blocks
from bitnet_train.model.weights import located


def write_gguf_model(source: Source, path: Path, type_name: str) -> None:
    """Writes the file whole or not at all; `type_name` is one of `GGUF_TYPES`."""
    types = GGUF_TYPES[type_name]
    fields = {**source.config_json, **asdict(source.config)}
    metadata = model_metadata(source.name, fields, types.file_type, source.licence) | source.tokenizer.gguf_metadata()
    tensors = {gguf_name(name): _blocks(source, name, types) for name in source.shapes}
    write_gguf(path, ARCHITECTURES[source.config.hidden_act], metadata, tensors)


def _blocks(source: Source, name: str, types: GGUFTypes) -> LazyBlocks:
    shape = source.shapes[name]
    if name in source.ternary_names:
        return LazyBlocks(types.ternary, shape, [lambda: _ternary(source, name, types.ternary)])
    kind = types.embedding if len(shape) > 1 else GGMLType.F32
    return LazyBlocks(kind, shape, [partial(_dense, source, name, kind, read) for read in source.weights.parts(name)])


def _ternary(source: Source, name: str, kind: GGMLType) -> bytes:
    codes, scale = source.weights.ternary(name)
    with located(source.path, name):
        if kind in TERNARY_TYPES:
            return pack_ternary_blocks(kind, codes, scale.item())
        return pack_float(codes * scale, kind)


def _dense(source: Source, name: str, kind: GGMLType, read: Callable[[], Tensor]) -> bytes:
    part = read()
    with located(source.path, name):
        return pack_float(part, kind)
