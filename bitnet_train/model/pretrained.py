"""Decoders from and to files: masters for training; masters, packed codes or GGUF for inference."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.hf_folder import CONFIG, GENERATION_CONFIG, HFFolder, folder_kind
from bitnet_train.formats.json_file import write_json
from bitnet_train.formats.recognise import what_it_is
from bitnet_train.formats.safetensors_file import LazyTensors, write_weights
from bitnet_train.model.accounting import check_modules, check_places, check_sizes, left_out
from bitnet_train.model.bitlinear import BitLinear, TernaryLinear, freeze
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.skeleton import skeleton, tensor_shapes, ternary_names, uninitialized
from bitnet_train.model.weights import (
    FolderWeights,
    GGUFWeights,
    Weights,
    check_finite,
    gguf_config,
    gguf_shapes,
    whole,
)


class SpecialIds(NamedTuple):
    """Ids with a role. `stop` ends a generation: the end of a text first, then the end of a turn."""

    bos: int | None
    stop: tuple[int, ...]
    pad: int


def source_folder(source: str, name: str) -> Path:
    """The model that a user means: a run directory, an HF folder, a GGUF file, or a hub id (downloaded).

    Args:
        source: what the user gave.
        name: what it was given for; stands in the message.

    Raises:
        UserError: there is no model.
    """
    path = Path(source)
    for folder in (path / "model", path):
        if (folder / CONFIG).is_file():
            return folder
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "status.json").is_file():
        raise UserError(f"{name}={source}: the run has not finished (no model/ in it); let it end first")
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(
            f"{name}={source}: no model there; give a run directory, a folder with {CONFIG} or a .gguf file: "
            f"{what_it_is(path)}"
        )
    return _download(source, name)


def _download(hub_id: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}={hub_id}: no such folder, and the hub did not give it either: {reason}") from error


def master_folder(folder: Path) -> HFFolder:
    """A folder of weights that can be trained.

    Raises:
        UserError: the folder is packed: masters cannot be had back from codes.
    """
    if folder.is_file() or folder_kind(folder) == "packed":
        raise UserError(
            f"{folder}: holds packed ternary weights, which cannot be trained: the masters behind them are lost; start "
            "from the master weights that they were exported from (quantization_mode online)"
        )
    return HFFolder(folder)


def load_for_training(folder: Path) -> BitNetForCausalLM:
    """The decoder of a folder of master weights, its parameters in float32.

    Raises:
        UserError: the folder is packed, no BitNet, or damaged.
    """
    source = master_folder(folder)
    model = BitNetForCausalLM(_config(source))
    left_out(source, dict(model.named_parameters()), model.config)
    for name, parameter in model.named_parameters():
        copy_tensor(source, name, parameter)
    return model


def load_for_inference(source: Path) -> BitNetForCausalLM:
    """The decoder of a master, packed or dense folder or a GGUF file, in float32, with every ternary matrix as codes.

    Raises:
        UserError: it is no BitNet, or damaged.
    """
    if source.is_file():
        file = GGUFFile(source)
        config = BitNetConfig.from_json(gguf_config(file), source)
        check_sizes(source, config, gguf_shapes(file))
        check_places(file, tensor_shapes(skeleton(config)))
        return load_weights(config, GGUFWeights(file))
    if folder_kind(source) == "packed":
        folder = HFFolder(source)
        config = _config(folder)
        outline = skeleton(config)
        left_out(folder, [*tensor_shapes(outline), *(f"{name}_scale" for name in ternary_names(outline))], config)
        return load_weights(config, FolderWeights(folder, "packed"))
    model = load_for_training(source)
    freeze(model)
    return model.eval()


def _config(folder: HFFolder) -> BitNetConfig:
    config = BitNetConfig.from_json(folder.config, folder.path / CONFIG)
    check_sizes(folder.path, config, folder.shapes)
    check_modules(folder.path / CONFIG, folder.config.get("quantization_config"), config)
    return config


@torch.no_grad()
def load_weights(config: BitNetConfig, weights: Weights) -> BitNetForCausalLM:
    """The decoder of a stored model in float32, every ternary matrix as codes and scale: inference only."""
    with uninitialized():
        model = BitNetForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            weight = weights.ternary(f"{name}.weight")
            _check_shape(weights.path, f"{name}.weight", weight.codes, module.weight)
            model.set_submodule(name, TernaryLinear(weight, module.bias))
    for name, parameter in model.named_parameters():
        tensor = whole(weights, name)
        _check_shape(weights.path, name, tensor, parameter)
        parameter.copy_(tensor)
    return model.eval()


def _check_shape(path: Path, name: str, stored: Tensor, parameter: Tensor) -> None:
    if stored.shape != parameter.shape:
        raise UserError(
            f"{path}: tensor {name} must have shape {tuple(parameter.shape)}, got {tuple(stored.shape)}; "
            f"the weights do not fit {CONFIG}"
        )


@torch.no_grad()
def copy_tensor(source: HFFolder, name: str, parameter: Tensor) -> None:
    """Copies a tensor of the folder into a parameter, in the parameter's dtype.

    Raises:
        UserError: the folder has none of this name, it has another shape, or a value is not finite.
    """
    if source.shape(name) != tuple(parameter.shape):
        raise UserError(
            f"{source.path}: tensor {name} must have shape {tuple(parameter.shape)}, got {source.shape(name)}; "
            f"the weights do not fit {CONFIG}"
        )
    tensor = source.load(name)
    check_finite(source.path, name, tensor)
    parameter.copy_(tensor)


def save_pretrained(
    folder: Path,
    model: BitNetForCausalLM,
    special_ids: SpecialIds,
    save_tokenizer: Callable[[Path], None],
    card: str = "",
) -> None:
    """`write_pretrained` with the parameters of a decoder."""
    weights = [LazyTensors.of(name, parameter.detach().cpu()) for name, parameter in model.named_parameters()]
    write_pretrained(folder, model.config, weights, special_ids, save_tokenizer, card)


def write_pretrained(
    folder: Path,
    config: BitNetConfig,
    weights: Iterable[LazyTensors],
    special_ids: SpecialIds,
    save_tokenizer: Callable[[Path], None],
    card: str,
) -> None:
    """Writes a folder of float32 masters: all of it or nothing.

    Args:
        folder: replaced if it is there.
        config: the decoder's.
        weights: its parameters, under transformers' names.
        special_ids: bos, stop and padding ids, for config.json and generation_config.json.
        save_tokenizer: writes the tokenizer's files into a folder.
        card: the README.md.
    """
    bos, stop, pad = special_ids
    config_json = {**config.to_json(), "bos_token_id": bos, "eos_token_id": stop[0], "pad_token_id": pad}
    with atomic_folder(folder) as temporary:
        write_weights(temporary, weights)
        write_json(temporary / CONFIG, {**config_json, "torch_dtype": "float32"})
        generation = {"bos_token_id": bos, "eos_token_id": list(stop), "pad_token_id": pad}
        write_json(temporary / GENERATION_CONFIG, {role: ids for role, ids in generation.items() if ids is not None})
        (temporary / "README.md").write_text(card)
        save_tokenizer(temporary)
