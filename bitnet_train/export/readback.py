"""Reading an export back and comparing every number in it with the trained one.

The readers share nothing with the writers. A scale, or a value of embedding, head or norms, is equal when the stored
number is the trained one rounded to the type that it is stored in: g itself in I2_S and in a packed folder of float32,
g rounded to 8 bits in one of bfloat16, the default. Codes are exact in every format but one: of float32 masters rounded
to bfloat16, about one weight in a thousand quantises to another code, and that is reported.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitnet_train.export.source import Source, open_source
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_blocks import FLOAT_TYPES, GGMLType
from bitnet_train.formats.parts import workers
from bitnet_train.model.weights import FolderWeights, GGUFWeights, Weights
from bitnet_train.quant import TernaryWeight

_SCALE_TYPES = FLOAT_TYPES | {
    GGMLType.I2_S: torch.float32,
    GGMLType.TQ1_0: torch.float16,
    GGMLType.TQ2_0: torch.float16,
}


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


def verify(source: Path, written: Path) -> Verification:
    """Compares an export, a GGUF file or a folder, with the model that it was made of.

    Raises:
        UserError: one of the two cannot be read.
    """
    return compare(open_source(source), open_source(written))


def compare(trained: Source, written: Source) -> Verification:
    """Compares every tensor of a model; see the module's text for what is equal."""
    with workers() as pool:
        counts = pool.map(partial(_difference, trained, written), trained.shapes)
        differ = dict(zip(trained.shapes, counts, strict=True))
    mismatches = tuple(name for name, count in differ.items() if count)
    codes = sum(prod(trained.shapes[name]) for name in trained.ternary_names)
    return Verification(len(trained.ternary_names), codes, sum(differ.values()), mismatches)


def _difference(trained: Source, written: Source, name: str) -> int:
    """How many numbers of a tensor differ; the scale is one of them."""
    if trained.shapes[name] != written.shapes.get(name):
        return prod(trained.shapes[name])
    if name not in trained.ternary_names:
        parts = zip(trained.weights.parts(name), written.weights.parts(name), strict=True)
        return sum(_differing(expected(), found()) for expected, found in parts)
    expected, found = trained.weights.ternary(name), written.weights.ternary(name)
    return _differing(expected.codes, found.codes) + _scale_differs(written.weights, name, expected.scale, found)


def _differing(expected: Tensor, found: Tensor) -> int:
    rounded = expected.to(found.dtype)
    if np.array_equal(_bytes(rounded), _bytes(found)):  # several times faster than torch.equal
        return 0
    return int((rounded != found).sum())


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _scale_differs(written: Weights, name: str, expected: Tensor, found: TernaryWeight) -> int:
    """0 or 1; a matrix of zeros has no scale that could be read back from floats, and needs none."""
    return _differing(_as_stored(written, name, expected), found.scale) if found.codes.any() else 0


def _as_stored(written: Weights, name: str, scale: Tensor) -> Tensor:
    """The scale rounded as the file rounds it, float32."""
    if isinstance(written, GGUFWeights):
        return scale.to(_SCALE_TYPES[written.file.kind(gguf_name(name))]).float()
    if not isinstance(written, FolderWeights) or written.kind != "packed":
        return scale
    dtype = written.dtype(f"{name}_scale")
    if written.folder.inverse_scale:
        return scale.reciprocal().to(dtype).float().reciprocal()
    return scale.to(dtype).float()
