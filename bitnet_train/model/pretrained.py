"""Decoders from and to model folders: masters for training, masters or packed codes for inference."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.formats.hf_folder import (
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS,
    HFFolder,
    LazyTensor,
    folder_kind,
    write_json,
    write_safetensors,
)
from bitnet_train.formats.packing import unpack_ternary
from bitnet_train.model.bitlinear import BitLinear, TernaryLinear, freeze
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import TernaryWeight


class SpecialIds(NamedTuple):
    """Ids with a role. `stop` ends a generation: the end of a text first, then the end of a turn."""

    bos: int
    stop: tuple[int, ...]
    pad: int


def source_folder(source: str, name: str) -> Path:
    """The model folder that a user means: a run directory, an HF folder, or a hub id (downloaded).

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
    if (path / "status.json").is_file():
        raise UserError(f"{name}={source}: the run has not finished (no model/ in it); let it end first")
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{name}={source}: no model there; give a run directory or a folder with {CONFIG}")
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
    if folder_kind(folder) == "packed":
        raise UserError(
            f"{folder}: holds packed ternary weights, which cannot be trained; start from the master weights they were "
            "exported from (quantization_mode online)"
        )
    return HFFolder(folder)


def load_for_training(folder: Path) -> BitNetForCausalLM:
    """The decoder of a folder of master weights, its parameters in float32.

    Raises:
        UserError: the folder is packed, no BitNet, or damaged.
    """
    source = master_folder(folder)
    model = BitNetForCausalLM(BitNetConfig.from_json(source.config))
    for name, parameter in model.named_parameters():
        copy_tensor(source, name, parameter)
    return model


def load_for_inference(folder: Path) -> BitNetForCausalLM:
    """The decoder of a master, packed or dense folder, in float32, with every ternary matrix as codes and scale.

    Raises:
        UserError: the folder is no BitNet, or damaged.
    """
    if folder_kind(folder) != "packed":
        model = load_for_training(folder)
        freeze(model)
        return model.eval()
    source = HFFolder(folder)
    model = BitNetForCausalLM(BitNetConfig.from_json(source.config))
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            model.set_submodule(name, _unpacked(source, name, module))
    for name, parameter in model.named_parameters():
        copy_tensor(source, name, parameter)
    return model.eval()


def _unpacked(source: HFFolder, name: str, layer: BitLinear) -> TernaryLinear:
    """The layer with the folder's codes; weight_scale is g in the dtype that the folder stores."""
    codes = unpack_ternary(source.load(f"{name}.weight"))
    if codes.shape != layer.weight.shape:
        raise UserError(
            f"{source.path}: tensor {name}.weight must hold codes of shape {tuple(layer.weight.shape)}, "
            f"got {tuple(codes.shape)}; the weights do not fit {CONFIG}"
        )
    scale = source.load(f"{name}.weight_scale").float().reshape(())
    return TernaryLinear(TernaryWeight(codes, scale), layer.bias)


@torch.no_grad()
def copy_tensor(source: HFFolder, name: str, parameter: Tensor) -> None:
    """Copies a tensor of the folder into a parameter, in the parameter's dtype.

    Raises:
        UserError: the folder has none of this name, or it has another shape.
    """
    if source.shape(name) != tuple(parameter.shape):
        raise UserError(
            f"{source.path}: tensor {name} must have shape {tuple(parameter.shape)}, got {source.shape(name)}; "
            f"the weights do not fit {CONFIG}"
        )
    parameter.copy_(source.load(name))


def save_pretrained(
    folder: Path, model: BitNetForCausalLM, special_ids: SpecialIds, save_tokenizer: Callable[[Path], None], card: str
) -> None:
    """Writes a folder of float32 masters: all of it or nothing.

    Args:
        folder: replaced if it is there.
        model: its parameters are written under transformers' names.
        special_ids: bos, stop and padding ids, for config.json and generation_config.json.
        save_tokenizer: writes the tokenizer's files into a folder.
        card: the README.md.
    """
    tensors = {name: LazyTensor.of(parameter.detach().cpu()) for name, parameter in model.named_parameters()}
    bos, stop, pad = special_ids
    config = {**model.config.to_json(), "bos_token_id": bos, "eos_token_id": stop[0], "pad_token_id": pad}
    with atomic_folder(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, {**config, "torch_dtype": "float32"})
        generation = {"bos_token_id": bos, "eos_token_id": list(stop), "pad_token_id": pad}
        write_json(temporary / GENERATION_CONFIG, generation)
        (temporary / "README.md").write_text(card)
        save_tokenizer(temporary)
