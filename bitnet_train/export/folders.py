"""Model folders: packed safetensors of either class, and masters; with tokenizer, generation config and model card."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.export.card import model_card
from bitnet_train.export.source import Source
from bitnet_train.export.targets import Target
from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.formats.hf_folder import CONFIG, GENERATION_CONFIG, quantization_config
from bitnet_train.formats.json_file import write_json
from bitnet_train.formats.packing import pack_ternary, packed_shape
from bitnet_train.formats.parts import nothing
from bitnet_train.formats.private_paths import without_paths
from bitnet_train.formats.safetensors_file import LazyTensors, TensorInfo, write_weights
from bitnet_train.formats.scale import rounded_scale
from bitnet_train.model.weights import located


def write_folder(
    source: Source,
    path: Path,
    target: Target,
    dtype: torch.dtype,
    max_shard_bytes: int,
    written: Callable[[Path, str], object] = nothing,
    whole: Callable[[Path], object] = nothing,
) -> None:
    """Writes the folder whole or not at all.

    Args:
        source: the model.
        path: the folder, replaced if it is there.
        target: master, or safetensors of a linear class.
        dtype: of the float tensors, the scales among them: transformers multiplies in it.
        max_shard_bytes: size at which the weights are cut into several files.
        written: called with the folder, under its temporary name, and each tensor that is in it.
        whole: called with the folder before it gets its name; it is removed if this raises.
    """
    masters = target.format == "master"
    tensors = _masters(source, dtype) if masters else _packed(source, target.variant, dtype)
    with atomic_folder(path) as folder:
        write_json(folder / CONFIG, _config(source, target, dtype))
        write_json(folder / GENERATION_CONFIG, source.generation_config)
        source.tokenizer.write(folder)
        write_weights(folder, tensors, max_shard_bytes, written)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        (folder / "README.md").write_text(model_card(source, target, path.name, size), encoding="utf-8")
        whole(folder)


def stored_scale(scale: Tensor, linear_class: str, dtype: torch.dtype) -> Tensor:
    """weight_scale `(1,)` of a packed folder: g for autobitlinear, 1 / g for bitlinear, rounded to the dtype.

    Raises:
        ValueError: the dtype does not hold it.
    """
    return rounded_scale(scale.reciprocal() if linear_class == "bitlinear" else scale, dtype).reshape(1)


def _masters(source: Source, dtype: torch.dtype) -> list[LazyTensors]:
    return [_cast(source, name, dtype) for name in source.shapes]


def _packed(source: Source, linear_class: str, dtype: torch.dtype) -> list[LazyTensors]:
    """The tensors of a packed folder; the codes of a matrix and its scale are made together."""

    def ternary(name: str) -> dict[str, Tensor]:
        codes, scale = source.weights.ternary(name)
        with located(source.path, name):
            stored = stored_scale(scale, linear_class, dtype)
        return {name: pack_ternary(codes), f"{name}_scale": stored}

    def lazy(name: str, rows: int, columns: int) -> LazyTensors:
        packed = TensorInfo(torch.uint8, packed_shape((rows, columns)))
        return LazyTensors({name: packed, f"{name}_scale": TensorInfo(dtype, (1,))}, [partial(ternary, name)])

    return [
        lazy(name, *shape) if name in source.ternary_names else _cast(source, name, dtype)
        for name, shape in source.shapes.items()
    ]


def check_range(part: Tensor) -> None:
    """Raises ValueError where a value, finite before, became infinite in this dtype."""
    if not torch.isfinite(torch.stack(part.aminmax())).all():
        raise ValueError(f"every value must be within the range of {part.dtype}, got more; use --dtype float32")


def _cast(source: Source, name: str, dtype: torch.dtype) -> LazyTensors:
    def cast(read: Callable[[], Tensor]) -> dict[str, Tensor]:
        part = read().to(dtype)
        with located(source.path, name):
            check_range(part)
        return {name: part}

    info = TensorInfo(dtype, source.shapes[name])
    return LazyTensors({name: info}, [partial(cast, read) for read in source.weights.parts(name)])


def _config(source: Source, target: Target, dtype: torch.dtype) -> dict[str, object]:
    """config.json of the folder: the source's, with what the weights now are, and the ids of the tokenizer."""
    config = without_paths(dict(source.config_json))
    config.pop("auto_map", None)  # names code to be run
    if source.tokenizer.eos_id is not None:  # BOS may be none: transformers' default is another tokenizer's
        config = {"bos_token_id": source.tokenizer.bos_id, "eos_token_id": source.tokenizer.eos_id} | config
    config.pop("dtype", None)  # transformers 5's name of torch_dtype
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    masters = target.format == "master"
    how = ("autobitlinear", "online") if masters else (target.variant, "offline")
    config["quantization_config"] = quantization_config(*how)
    return config
