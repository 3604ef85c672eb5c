"""GGUF files: one file with the model, its tokenizer and its chat template."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from bitnet_train.export.source import Source
from bitnet_train.export.targets import GGUF_TYPES, GGUFTypes
from bitnet_train.formats.gguf_bitnet import ARCHITECTURES, gguf_name, model_metadata
from bitnet_train.formats.gguf_blocks import SCALE_TYPES, GGMLType, pack_float
from bitnet_train.formats.gguf_file import LazyBlocks, write_gguf
from bitnet_train.formats.gguf_ternary import TERNARY_TYPES, pack_ternary_blocks
from bitnet_train.formats.parts import nothing
from bitnet_train.formats.private_paths import without_path
from bitnet_train.formats.scale import all_zero, rounded_scale
from bitnet_train.model.weights import GGUFWeights, located


def write_gguf_model(
    source: Source,
    path: Path,
    type_name: str,
    written: Callable[[Path, str], object] = nothing,
    whole: Callable[[Path], object] = nothing,
) -> None:
    """Writes the file whole or not at all.

    Args:
        source: the model.
        path: the file, replaced if it is there.
        type_name: one of `GGUF_TYPES`.
        written: called with the file, under its temporary name, and each tensor of the model that is in it.
        whole: called with the file before it gets its name; it is removed if this raises.
    """
    of_tensors = GGUF_TYPES[type_name]
    fields = {**source.config_json, **asdict(source.config)}
    name = without_path(source.name)
    metadata = model_metadata(name, fields, of_tensors.file_type, source.licence) | source.gguf_tokenizer
    names = {gguf_name(name): name for name in source.shapes}
    tensors = {stored: _blocks(source, name, of_tensors) for stored, name in names.items()}
    architecture = ARCHITECTURES[source.config.hidden_act]
    kept = source.weights.file.types if isinstance(source.weights, GGUFWeights) and source.own_tokenizer else {}
    types = {key: kept[key] for key in kept.keys() & source.gguf_tokenizer}  # of keys that are copied
    write_gguf(path, architecture, metadata, tensors, lambda file, stored: written(file, names[stored]), whole, types)


def _blocks(source: Source, name: str, types: GGUFTypes) -> LazyBlocks:
    shape = source.shapes[name]
    if name in source.ternary_names:
        return LazyBlocks(types.ternary, shape, [lambda: _ternary(source, name, types.ternary)])
    kind = types.embedding if len(shape) > 1 else GGMLType.F32
    return LazyBlocks(kind, shape, [partial(_dense, source, name, kind, read) for read in source.weights.parts(name)])


def _ternary(source: Source, name: str, kind: GGMLType) -> memoryview:
    codes, scale = source.weights.ternary(name)
    with located(source.path, name):
        if not all_zero(codes):
            rounded_scale(scale, SCALE_TYPES[kind])  # for its ValueError: the packers round by themselves
        if kind in TERNARY_TYPES:
            return pack_ternary_blocks(kind, codes, scale.item())
        return pack_float(codes * scale, kind)


def _dense(source: Source, name: str, kind: GGMLType, read: Callable[[], Tensor]) -> memoryview:
    part = read()
    with located(source.path, name):
        return pack_float(part, kind)
