"""The tensors of a stored model, one at a time, by the names that transformers has for them.

    stored as                  codes and scale
    master folder              quantised now: g in float32
    packed folder              as stored: weight_scale, or 1 / weight_scale where the folder is of class bitlinear
    GGUF I2_S, TQ1_0, TQ2_0    as stored
    GGUF F32, F16, BF16        sign, and largest magnitude: such a matrix holds -g, 0 and g

What is quantised already is never quantised again: the absmean of q g is not g, it is smaller by the share of codes
that are not zero.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.gguf_bitnet import config_json, gguf_name, transformers_name
from bitnet_train.formats.gguf_blocks import FLOAT_TYPES, unpack_float
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_ternary import TERNARY_TYPES, unpack_ternary_blocks
from bitnet_train.formats.hf_folder import HFFolder, Kind, quantization_config
from bitnet_train.formats.json_file import check
from bitnet_train.formats.packing import unpack_ternary
from bitnet_train.formats.parts import row_slices
from bitnet_train.formats.scale import all_zero
from bitnet_train.formats.schemas import GGUF_MODEL
from bitnet_train.quant import WEIGHT_EPS, TernaryWeight, quantize_weight

_NO_CODE = 2  # stands for a stored value that is neither 0 nor plus or minus the scale


class Weights(Protocol):
    """The tensors of a model. Every method raises UserError where the file is damaged or a value is not finite."""

    @property
    def path(self) -> Path:
        """The folder or file that holds them."""

    def ternary(self, name: str) -> TernaryWeight:
        """Codes `(out, in)` of a matrix, and its scale g, float32."""

    def parts(self, name: str) -> Sequence[Callable[[], Tensor]]:
        """Calls that read any other tensor in its stored dtype, by blocks of rows."""

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of such a tensor."""


@contextmanager
def located(path: Path, name: str) -> Iterator[None]:
    """Puts file and tensor in front of a ValueError of the formats, which know neither."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {name}: {error}") from None


def whole(weights: Weights, name: str) -> Tensor:
    """A tensor that is not ternary, in one piece."""
    return torch.cat([read() for read in weights.parts(name)])


@dataclass(frozen=True)
class FolderWeights:
    """The `Weights` of an HF folder; a dense one is taken for masters."""

    folder: HFFolder
    kind: Kind

    @property
    def path(self) -> Path:
        return self.folder.path

    def ternary(self, name: str) -> TernaryWeight:
        if self.kind != "packed":
            weight = self.folder.load(name)
            ternary = quantize_weight(weight)
            if not ternary.scale.isfinite():  # as little as one weight makes it so
                check_finite(self.path, name, weight)
            return ternary
        with located(self.path, name):
            codes = unpack_ternary(self.folder.load(name))
        scale = self.folder.load(f"{name}_scale").float().reshape(())
        g = scale.reciprocal() if self.folder.inverse_scale else scale
        return _checked(self.path, f"{name}_scale", TernaryWeight(codes, g), scale)

    def parts(self, name: str) -> Sequence[Callable[[], Tensor]]:
        return [partial(self._finite, name, read) for read in self.folder.parts(name)]

    def _finite(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        part = read()
        check_finite(self.path, name, part)
        return part

    def dtype(self, name: str) -> torch.dtype:
        return self.folder.dtype(name)


@dataclass(frozen=True)
class GGUFWeights:
    """The `Weights` of a GGUF file that was written here."""

    file: GGUFFile

    @property
    def path(self) -> Path:
        return self.file.path

    def ternary(self, name: str) -> TernaryWeight:
        kind = self.file.kind(gguf_name(name))
        if kind not in TERNARY_TYPES:
            return _of_floats(whole(self, name))
        with located(self.path, name):
            codes, scale = unpack_ternary_blocks(kind, self.file.read(gguf_name(name)), self.shape(name))
        return _checked(self.path, name, TernaryWeight(codes, torch.tensor(scale)), torch.tensor(scale))

    def parts(self, name: str) -> Sequence[Callable[[], Tensor]]:
        return [partial(self._rows, name, rows) for rows in row_slices(self.shape(name))]

    def _rows(self, name: str, rows: slice) -> Tensor:
        others = self.shape(name)[1:]
        row_bytes = prod(others) * self.dtype(name).itemsize
        data = self.file.read(gguf_name(name), rows.start * row_bytes, rows.stop * row_bytes)
        part = unpack_float(data, self.file.kind(gguf_name(name)), (-1, *others))
        check_finite(self.path, name, part)
        return part

    def dtype(self, name: str) -> torch.dtype:
        kind = self.file.kind(gguf_name(name))
        if kind not in FLOAT_TYPES:
            raise UserError(f"{self.path}: {name}: type must be a float type, got {kind.name}")
        return FLOAT_TYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, `(out, in)` for a matrix."""
        self.file.kind(gguf_name(name))
        return self.file.tensors[gguf_name(name)].shape


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    Raises:
        UserError: it holds another architecture, lacks a key, or has one of another type.
    """
    check(file.metadata, str(file.path), GGUF_MODEL)
    try:
        config = config_json(file.metadata, tied=gguf_name("lm_head.weight") not in file.tensors)
    except ValueError as error:
        raise UserError(f"{file.path}: {error}; export the model again") from None
    return {**config, "quantization_config": quantization_config("autobitlinear", "offline")}


def gguf_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a GGUF file, by the names that transformers has for them."""
    return {transformers_name(stored): info.shape for stored, info in file.tensors.items()}


def _checked(path: Path, name: str, weight: TernaryWeight, stored: Tensor) -> TernaryWeight:
    """The weight, whose scale g must be above 0; a matrix of zeros may have 0, and gets that of masters of zeros."""
    codes, g = weight
    if g == 0 and all_zero(codes):
        return TernaryWeight(codes, torch.full_like(g, WEIGHT_EPS))
    if not g.isfinite() or g <= 0:
        inverse = "" if g.equal(stored) or g.isnan() else f" (1 / g, so that g is {g.item():g})"
        raise UserError(
            f"{path}: {name}: the scale of the matrix must be finite and above 0, got {stored.item():g}{inverse}; "
            "export the model again from its masters"
        )
    return weight


def _of_floats(values: Tensor) -> TernaryWeight:
    scale = values.abs().max()
    if scale == 0:
        return TernaryWeight(torch.zeros(values.shape, dtype=torch.int8), torch.tensor(WEIGHT_EPS))
    codes = torch.where((values == 0) | (values.abs() == scale), values.sign(), _NO_CODE)
    return TernaryWeight(codes.to(torch.int8), scale.float())


def check_finite(path: Path, name: str, values: Tensor) -> None:
    """Raises UserError where a value is NaN or infinite."""
    if not torch.stack(values.aminmax()).isfinite().all():
        bad = int(values.isfinite().logical_not().sum())
        raise UserError(f"{path}: {name}: every value must be finite, got {bad} that are not; give an older model")
