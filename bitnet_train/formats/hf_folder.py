"""A model folder as the Hugging Face libraries lay it out, read and written one tensor at a time.

    config.json                     the shape of the model; quantization_config says what the weights are
    model.safetensors               or shards, with model.safetensors.index.json {"weight_map": {tensor: file}}
    tokenizer.json, ...             see TOKENIZER_FILES
    generation_config.json          stop tokens, sampling

    quantization_config             the folder holds
    absent                          "dense": a model that is not ternary
    autobitlinear, online           "master": float weights that are quantised in the forward pass
    autobitlinear, offline          "packed": codes and `<weight>_scale` = g, by which the product is multiplied

A safetensors file is: the header's length (u64), the header (JSON, padded with spaces), the tensors without gaps,
row-major; all little endian. Source: the safetensors README, section "Format".
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet_train.errors import UserError

Kind = Literal["master", "packed", "dense", "none"]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
_KINDS: dict[object, Kind] = {"online": "master", "offline": "packed"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: must be JSON: {error}; write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}; write it again")
    return content


def folder_kind(folder: Path) -> Kind:
    """What the folder holds, by its config.json; "none" where there is none.

    Raises:
        UserError: config.json is damaged, or is quantised in a way that this project does not read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return "none"
    quantization = read_json(path).get("quantization_config")
    if quantization is None:
        return "dense"
    known = isinstance(quantization, dict) and quantization.get("linear_class") == "autobitlinear"
    kind = _KINDS.get(quantization.get("quantization_mode")) if known else None
    if kind is None:
        raise UserError(
            f"{path}: quantization_config must have linear_class autobitlinear (bitlinear stores 1 / scale) and "
            f"quantization_mode online or offline, got {quantization}"
        )
    return kind


class SafetensorsFile(Protocol):
    """What is used of `safetensors.safe_open`, which has no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> Any: ...
    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a model folder, each read from its file when it is asked for."""

    path: Path
    _open_files: dict[Path, SafetensorsFile] = field(default_factory=dict, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / CONFIG)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, by the tensor's name.

        Raises:
            UserError: there are no weights, or the index names a file that is not in the folder.
        """
        if (self.path / WEIGHTS).is_file():
            file = self.path / WEIGHTS
            return dict.fromkeys(self._open(file).keys(), file)
        if not (self.path / WEIGHTS_INDEX).is_file():
            raise UserError(f"{self.path}: must hold {WEIGHTS} or {WEIGHTS_INDEX}, found neither; give a model folder")
        weight_map = read_json(self.path / WEIGHTS_INDEX).get("weight_map", {})
        for name in set(weight_map.values()):
            if Path(name).name != name or not (self.path / name).is_file():
                raise UserError(
                    f"{self.path / WEIGHTS_INDEX}: names {name!r}, which is not in the folder; add the file"
                )
        return {tensor: self.path / name for tensor, name in weight_map.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read from the header.

        Raises:
            UserError: the folder has no such tensor, or its file is damaged.
        """
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        """A tensor in its stored dtype.

        Raises:
            UserError: the folder has no such tensor, or its file is damaged.
        """
        return self._file_of(name).get_tensor(name)

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            raise UserError(f"{self.path}: tensor {name!r} is missing; the weights do not fit config.json")
        return self._open(self.files[name])

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._open_files:
            try:
                self._open_files[path] = cast(SafetensorsFile, safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: must be a whole safetensors file: {error}; copy it again") from None
        return self._open_files[path]


class LazyTensor(NamedTuple):
    """A tensor that is to be written: `load` makes it, of this dtype and shape, when its turn has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a safetensors file with one tensor in memory at a time (metadata {"format": "pt"}).

    Wide dtypes come first, then names in order, as the safetensors library sorts them: every tensor is then aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            dtype, shape, load = tensors[name]
            tensor = load().detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON file with an indent of two, as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
