"""Reading an export back and comparing every number in it with the trained one.

The readers share nothing with the writers. A scale, a master, or a value of embedding, head or norms is equal when the
stored number is the trained one rounded to the type that it is stored in: g itself in I2_S and in a packed folder of
float32, g rounded to 8 bits in one of bfloat16, the default. Codes are exact. Of float32 masters that are rounded to
bfloat16 about one in a thousand quantises to another code, and how many do is told.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitnet_train.export.source import Source, open_source
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_blocks import SCALE_TYPES
from bitnet_train.formats.parts import workers
from bitnet_train.formats.scale import all_zero
from bitnet_train.model.weights import FolderWeights, GGUFWeights, Weights
from bitnet_train.quant import TernaryWeight

_WAITING = 4  # matrices whose codes wait to be compared


@dataclass(frozen=True)
class Verification:
    """The result of a comparison.

    Attributes:
        matrices, codes: ternary matrices, and codes in them.
        differ: how many numbers differ.
        mismatches: the tensors where some do.
        tensors: all that were compared.
        rounded: codes that are others because masters were rounded to a narrower type, as was asked for.
    """

    matrices: int
    codes: int
    differ: int
    mismatches: tuple[str, ...]
    tensors: int = 0
    rounded: int = 0

    def __str__(self) -> str:
        counts = f"{self.matrices} matrices, {self.codes} codes, {self.differ} differ"
        if not self.mismatches:
            rounded = f"; {self.rounded} codes are others by the rounding of the masters" if self.rounded else ""
            return f"verified: {counts}{rounded}"
        return f"not verified: {counts}, in {len(self.mismatches)} tensors, first {self.mismatches[0]}"


class NotVerifiedError(RuntimeError):
    """An export is not what was trained; it was removed. The message says what differs."""


def verify(source: Path, written: Path) -> Verification:
    """Compares an export, a GGUF file or a folder, with the model that it was made of.

    Raises:
        UserError: one of the two cannot be read.
    """
    trained, found = open_source(source), open_source(written)
    with workers() as pool:
        counts = {name: _submit(pool, _comparisons(trained, found, name)) for name in trained.shapes}
        rounded = [pool.submit(_rounded, trained, found, name) for name in trained.ternary_names]
        return _verification(trained, counts, rounded)


class Readback:
    """Compares each tensor as soon as it is written, in threads of its own, while the next ones are made.

    The masters are so read and quantised once: the codes that quant.py made of a matrix wait here until its bytes have
    been read from the file.

    Attributes:
        source: the model, for the writer to take the codes from.
        zeros: the matrices without a code that is not 0.
    """

    def __init__(self, trained: Source, pool: ThreadPoolExecutor) -> None:
        self._made: dict[str, TernaryWeight] = {}
        self.zeros: list[str] = []
        self.source = replace(trained, weights=_Keeping(trained.weights, self._made, self.zeros))
        self._trained = trained
        self._pool = pool
        self._opened: Source | None = None
        self._counts: dict[str, list[Future[int]]] = {}
        self._rounded: list[Future[int]] = []

    def written(self, path: Path, name: str) -> None:
        """Has a tensor compared; waits where many codes are kept already, and for all when this was the last one."""
        if name not in self._trained.shapes:  # a scale comes with its codes
            return
        self._opened = self._opened or open_source(path)
        comparisons = _comparisons(self._trained, self._opened, name, self._made.pop(name, None))
        self._counts[name] = _submit(self._pool, comparisons)
        if name in self._trained.ternary_names:
            self._rounded.append(self._pool.submit(_rounded, self._trained, self._opened, name))
        matrices = [name for name in self._counts if name in self._trained.ternary_names]
        whole = len(self._counts) == len(self._trained.shapes)
        wait(chain.from_iterable(self._counts[name] for name in (self._counts if whole else matrices[:-_WAITING])))

    def result(self) -> Verification:
        """What was found.

        Raises:
            UserError: what was written cannot be read.
        """
        return _verification(self._trained, self._counts, self._rounded)


@contextmanager
def readback(trained: Source) -> Iterator[Readback]:
    """A `Readback`, whose threads end with the block."""
    with workers() as pool:
        yield Readback(trained, pool)


@dataclass(frozen=True)
class _Keeping:
    """The `Weights` of a model, whose codes are noted when they are made, and whether all are 0."""

    weights: Weights
    made: dict[str, TernaryWeight]
    zeros: list[str]

    @property
    def path(self) -> Path:
        return self.weights.path

    def ternary(self, name: str) -> TernaryWeight:
        self.made[name] = self.weights.ternary(name)
        if all_zero(self.made[name].codes):
            self.zeros.append(name)
        return self.made[name]

    def parts(self, name: str) -> Sequence[Callable[[], Tensor]]:
        return self.weights.parts(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)


def _submit(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], int]]) -> list[Future[int]]:
    return [pool.submit(call) for call in calls]


def _verification(
    trained: Source, counts: Mapping[str, Sequence[Future[int]]], rounded: Iterable[Future[int]]
) -> Verification:
    differ = {name: sum(count.result() for count in counts[name]) for name in trained.shapes}
    mismatches = tuple(name for name, count in differ.items() if count)
    codes = sum(prod(trained.shapes[name]) for name in trained.ternary_names)
    others = sum(count.result() for count in rounded)
    return Verification(len(trained.ternary_names), codes, sum(differ.values()), mismatches, len(counts), others)


def _comparisons(
    trained: Source, written: Source, name: str, made: TernaryWeight | None = None
) -> list[Callable[[], int]]:
    """Calls that count how many numbers of a tensor differ, by parts; codes that were `made` are not made again."""
    shape = trained.shapes[name]
    if shape != written.shapes.get(name):
        return [lambda: prod(shape)]
    if name in trained.ternary_names and written.kind == "ternary":
        return [partial(_matrix_differs, trained.weights, written.weights, name, made)]
    parts = zip(trained.weights.parts(name), written.weights.parts(name), strict=True)
    return [partial(_part_differs, expected, found) for expected, found in parts]


def _rounded(trained: Source, written: Source, name: str) -> int:
    """Codes of a matrix of masters that rounding them to a narrower type made others."""
    if written.kind == "ternary" or written.weights.dtype(name) == trained.weights.dtype(name):
        return 0
    return _differing(trained.weights.ternary(name).codes, written.weights.ternary(name).codes)


def _part_differs(expected: Callable[[], Tensor], found: Callable[[], Tensor]) -> int:
    return _differing(expected(), found())


def _matrix_differs(trained: Weights, written: Weights, name: str, made: TernaryWeight | None) -> int:
    """The scale is one of the numbers."""
    expected, found = made or trained.ternary(name), written.ternary(name)
    return _differing(expected.codes, found.codes) + _scale_differs(written, name, expected.scale, found)


def _differing(expected: Tensor, found: Tensor) -> int:
    rounded = expected.to(found.dtype)
    if np.array_equal(_bytes(rounded), _bytes(found)):  # several times faster than torch.equal
        return 0
    return int((rounded != found).sum())


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's memory in the widest unit that divides it: what is compared in one step of a processor."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return data if data.nbytes % 8 else data.view(np.uint64)


def _scale_differs(written: Weights, name: str, expected: Tensor, found: TernaryWeight) -> int:
    """0 or 1; a matrix of zeros has no scale that could be read back from floats, and needs none."""
    differs = _differing(_as_stored(written, name, expected), found.scale)
    return 0 if differs and all_zero(found.codes) else differs


def _as_stored(written: Weights, name: str, scale: Tensor) -> Tensor:
    """The scale rounded as the file rounds it, float32."""
    if isinstance(written, GGUFWeights):
        return scale.to(SCALE_TYPES[written.file.kind(gguf_name(name))]).float()
    if not isinstance(written, FolderWeights) or written.kind != "packed":
        return scale
    dtype = written.dtype(f"{name}_scale")
    if written.folder.inverse_scale:
        return scale.reciprocal().to(dtype).float().reciprocal()
    return scale.to(dtype).float()
