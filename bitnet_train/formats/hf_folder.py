"""A model folder as the Hugging Face libraries lay it out, read one tensor at a time.

    config.json                     the shape of the model; quantization_config says what the weights are
    model.safetensors               or shards, with model.safetensors.index.json {"weight_map": {tensor: file}}
    tokenizer.json, ...             see `tokenizer_files`
    generation_config.json          stop tokens, sampling

    quantization_config             the folder holds
    absent                          "dense": a model that is not ternary
    autobitlinear, online           "master": float weights that are quantised in the forward pass
    autobitlinear, offline          "packed": codes and `<weight>_scale` = g, by which the product is multiplied
    bitlinear                       "packed": codes and `<weight>_scale` = 1 / g, by which the product is divided

Where linear_class or quantization_mode is absent or null, transformers takes bitlinear and offline.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import read_json
from bitnet_train.formats.parts import row_slices
from bitnet_train.formats.safetensors_file import WEIGHTS, WEIGHTS_INDEX, StoredTensor, stored_tensors
from bitnet_train.formats.schemas import Index, ModelFolder

Kind = Literal["master", "packed", "dense", "none"]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
LINEAR_CLASSES = ("autobitlinear", "bitlinear")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KINDS: dict[object, Kind] = {
    ("autobitlinear", "online"): "master",
    ("autobitlinear", "offline"): "packed",
    ("bitlinear", "offline"): "packed",
}


def quantization_config(linear_class: str, mode: str) -> dict[str, str]:
    """The quantization_config of a folder that is written here; see the module's text."""
    return {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}


def folder_kind(folder: Path) -> Kind:
    """What the folder holds, by its config.json; "none" where there is none.

    Raises:
        UserError: config.json is damaged, or is quantised in a way that this project does not read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return "none"
    quantization = read_json(path, ModelFolder).get("quantization_config")
    if quantization is None:
        return "dense"
    if quantization.get("quant_method") != "bitnet":
        raise UserError(f"{path}: quantization_config.quant_method must be 'bitnet', got {quantization}")
    if quantization.get("use_rms_norm"):
        raise UserError(
            f"{path}: quantization_config.use_rms_norm must be false, got true: the model has a norm in every linear "
            "layer, which this decoder lacks"
        )
    mode = quantization.get("quantization_mode") or "offline"
    kind = _KINDS.get((linear_class(quantization), mode))
    if kind is None:
        raise UserError(
            f"{path}: quantization_config must be autobitlinear, online or offline, or bitlinear, offline, got "
            f"{linear_class(quantization)}, {mode}"
        )
    return kind


def linear_class(quantization: Mapping[str, Any]) -> str:
    """linear_class, which decides what weight_scale means: g for autobitlinear, 1 / g for bitlinear."""
    name: str = quantization.get("linear_class") or "bitlinear"
    return name


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a model folder, each read from its file when it is asked for.

    Raises (every method):
        UserError: a file is missing or damaged, or the folder has no such tensor.
    """

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / CONFIG, ModelFolder)

    @property
    def inverse_scale(self) -> bool:
        """Whether weight_scale of a packed folder is 1 / g."""
        return linear_class(self.config["quantization_config"]) == "bitlinear"

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where each tensor lies, by its name."""
        if (self.path / WEIGHTS).is_file():
            return stored_tensors(self.path / WEIGHTS)
        if not (self.path / WEIGHTS_INDEX).is_file():
            self._refuse_pickle()
            raise UserError(f"{self.path}: must hold {WEIGHTS} or {WEIGHTS_INDEX}, found neither; give a model folder")
        weight_map = read_json(self.path / WEIGHTS_INDEX, Index)["weight_map"]
        shards = {file: self._shard(file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise UserError(f"{self.path / file}: tensor {name!r} is missing, which {WEIGHTS_INDEX} places there")
        return {name: shards[file][name] for name, file in weight_map.items()}

    def _shard(self, name: str) -> dict[str, StoredTensor]:
        if name not in {entry.name for entry in self.path.iterdir() if entry.is_file()}:  # it may be no name at all
            raise UserError(
                f"{self.path / WEIGHTS_INDEX}: names {name[:100]!r}, which is not in the folder; add the file"
            )
        return stored_tensors(self.path / name)

    def _refuse_pickle(self) -> None:
        for file in sorted(self.path.iterdir()):
            if file.suffix in _PICKLES:
                raise UserError(
                    f"{file}: is a pickle, which can run code when it is read; convert what you trust to {WEIGHTS}"
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensor(name).dtype

    def load(self, name: str) -> Tensor:
        """A tensor in its stored dtype."""
        return self._tensor(name).load()

    def parts(self, name: str) -> list[Callable[[], Tensor]]:
        """Calls that read a tensor by blocks of rows."""
        tensor = self._tensor(name)
        return [partial(tensor.rows, rows) for rows in row_slices(tensor.shape)]

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {name!r} is missing; the weights do not fit config.json")
        return self.tensors[name]
