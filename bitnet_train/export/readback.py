"""Reading an export back and comparing every number in it with the trained one.

The readers share nothing with the writers. A scale, or a value of embedding, head or norms, is equal when the stored
number is the trained one rounded to the type that it is stored in: g itself in I2_S and in a packed folder of float32,
g rounded to 8 bits in one of bfloat16, the default. Codes are exact in every format but one: of float32 masters rounded
to bfloat16, about one weight in a thousand quantises to another code, and that is reported.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.export.source import ModelFolder, Weights, located
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_blocks import GGMLType, unpack_float, unpack_i2_s
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.quant import TernaryWeight

_NO_CODE = 2  # stands for a stored value that is neither 0 nor plus or minus the scale


@dataclass(frozen=True)
class Verification:
    """What was compared: ternary matrices and codes in them; how many numbers differ; the tensors where some do."""

    matrices: int
    codes: int
    differ: int
    mismatches: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{self.matrices} matrices, {self.codes} codes, {self.differ} differ"
        if not self.mismatches:
            return f"verified: {counts}"
        return f"not verified: {counts}, in {len(self.mismatches)} tensors, first {self.mismatches[0]}"


@dataclass(frozen=True)
class GGUFWeights:
    """The `Weights` of a GGUF file."""

    file: GGUFFile

    def ternary(self, name: str) -> TernaryWeight:
        """Codes and scale; of a float tensor the sign, and the largest magnitude."""
        if self.file.kind(gguf_name(name)) != GGMLType.I2_S:
            values = self.dense(name)
            scale = values.abs().max()
            codes = torch.where((values == 0) | (values.abs() == scale), values.sign(), _NO_CODE)
            return TernaryWeight(codes.to(torch.int8), scale)
        with located(self.file.path, name):
            codes, g = unpack_i2_s(self.file.read(gguf_name(name)), self.file.tensors[gguf_name(name)].shape)
        return TernaryWeight(codes, torch.tensor(g))

    def dense(self, name: str) -> Tensor:
        """A float tensor in its stored dtype."""
        kind, shape = self.file.kind(gguf_name(name)), self.file.tensors[gguf_name(name)].shape
        return unpack_float(self.file.read(gguf_name(name)), kind, shape)


def verify(source: Path, written: Path) -> Verification:
    """Compares an export, a GGUF file or a folder, with the run directory or folder that it was made of.

    Raises:
        UserError: one of the two cannot be read.
    """
    model = ModelFolder.open(source)
    return compare(model, ModelFolder.open(written) if written.is_dir() else GGUFWeights(GGUFFile(written)))


def compare(trained: ModelFolder, written: Weights) -> Verification:
    """Compares every tensor of a model; see the module's text for what is equal."""
    ternary = dict.fromkeys(trained.ternary_names)
    differ = {name: _difference(trained, written, name, name in ternary) for name in trained.shapes}
    mismatches = tuple(name for name, count in differ.items() if count)
    codes = sum(prod(trained.shapes[name]) for name in ternary)
    return Verification(len(ternary), codes, sum(differ.values()), mismatches)


def _difference(trained: Weights, written: Weights, name: str, ternary: bool) -> int:
    """How many numbers of a tensor differ; the scale is one of them."""
    if not ternary:
        return _differing(trained.dense(name), written.dense(name))
    expected, found = trained.ternary(name), written.ternary(name)
    return _differing(expected.codes, found.codes) + _scale_differs(expected, found)


def _differing(expected: Tensor, found: Tensor) -> int:
    if expected.shape != found.shape:
        return max(expected.numel(), found.numel())
    rounded = expected.to(found.dtype)
    return 0 if torch.equal(rounded, found) else int((rounded != found).sum())


def _scale_differs(expected: TernaryWeight, found: TernaryWeight) -> int:
    """0 or 1; a matrix of zeros has no scale that could be read back from floats, and needs none."""
    return _differing(expected.scale, found.scale) if found.codes.any() else 0
