"""The int8 product of a BitLinear on CUDA, with the scales behind it: in the fastest of several ways.

    y = (codes . ternary^T) column / scale + bias + residual

The sums are exact and what follows rounds alike in every way, so that the choice changes no bit. It is made by trying,
once for each kind of product, and whoever gives another result than torch's is left out:

    hopper      a program of `hopper_product`, on H100 and H200
    in one      a program of `triton_kernels`, elsewhere and for few tokens; its tiles are tried, too
    in two      torch's int8 product, and a pass behind it
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bitnet_train.kernels.gpu import ROUNDING, launch, vector
from bitnet_train.kernels.integer_matmul import integer_matmul

if TYPE_CHECKING:
    from bitnet_train.kernels.hopper_product import Tile

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)  # the one compute capability that has these tensor cores' instructions
_PART = 1024  # of a row, for the pass behind torch's product
_MOST_FEATURES = 256  # of a step of a product, over all its tiles
_SMALLEST = 17  # tokens that torch's int8 product is for
_ALIGNED = 16  # bytes that are read at once
_WARMUP, _REPETITIONS = 5, 25  # milliseconds that a way is tried for
_CHECKED = 512  # rows, the last ones, that a way is compared with torch in


class Product(NamedTuple):
    """The operands, contiguous: int8 `(tokens, in)` and `(out, in)`, float32 `(out,)` and `(tokens, 1)`."""

    codes: Tensor
    ternary: Tensor
    column: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    dtype: torch.dtype

    @property
    def kind(self) -> tuple[object, ...]:
        """Products of one kind take about the same time."""
        (tokens, size), others = self.codes.shape, (self.bias, self.residual)
        dtypes = (None if other is None else other.dtype for other in others)
        return size, len(self.ternary), tokens.bit_length(), self.dtype, *dtypes, self.codes.device

    def last(self, rows: int) -> "Product":
        """The product of the last rows alone."""
        residual = None if self.residual is None else self.residual[-rows:]
        return self._replace(codes=self.codes[-rows:], scale=self.scale[-rows:], residual=residual)

    def result(self) -> Tensor:
        """y, not yet written."""
        return torch.empty(len(self.codes), len(self.ternary), dtype=self.dtype, device=self.codes.device)


Way = Callable[[Product], Tensor]
_FASTEST: dict[tuple[object, ...], Way] = {}  # of each kind of product


def linear(
    codes: Tensor,
    ternary: Tensor,
    column: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = (codes . ternary^T) column / scale + bias + residual, see `fused.linear`: `(tokens, out)` of `dtype`."""
    out = len(ternary)
    product = Product(
        codes.contiguous(),
        ternary.contiguous(),
        column.contiguous(),
        scale.contiguous(),
        vector(bias, out),
        None if residual is None else residual.expand(len(codes), out).contiguous(),
        dtype,
    )
    return _way(product)(product)


def ways(product: Product) -> dict[str, Way]:
    """Every way that may be tried on this device, by its name."""
    return {"in two": _in_two, "in one": _in_one, **_hopper_ways(product)}


def _way(product: Product) -> Way:
    (tokens, size), out = product.codes.shape, len(product.ternary)
    if not tokens * size * out or size % _ALIGNED:
        return _in_two
    aligned = not any(matrix.data_ptr() % _ALIGNED for matrix in (product.codes, product.ternary))
    if tokens < _SMALLEST or out % 8 or not aligned or product.codes.device.type != "cuda":
        return _in_one
    kind = product.kind
    if (way := _FASTEST.get(kind)) is None:
        hopper = list(_hopper_ways(product).values())
        way = _FASTEST[kind] = _fastest(product, hopper) or _fastest(product, [_in_one]) or _in_two
    return way


def _fastest(product: Product, ways: list[Way]) -> Way | None:
    """The fastest of these ways and of `_in_two`; None where none of these ways works."""
    if not ways:
        return None
    expected = _expected(product)
    times = {way: _milliseconds(way, product, expected) for way in ways}
    if min(times.values()) == math.inf:
        return None
    times[_in_two] = _milliseconds(_in_two, product, expected)
    return min(times, key=lambda way: times[way])


def _expected(product: Product) -> Tensor | None:
    """The last rows by torch's product; None where torch knows no such product."""
    try:
        return _in_two(product.last(_CHECKED))
    except Exception:
        torch.cuda.synchronize(product.codes.device)  # a device that has failed says so again
        return None


def _milliseconds(way: Way, product: Product, expected: Tensor | None) -> float:
    """How long it takes; for ever where it cannot be compiled, has no memory, or gives another result.

    Raises:
        RuntimeError: the device has failed, and all that follows would.
    """
    from triton.testing import do_bench

    try:
        last = way(product)[-_CHECKED:]
        # As bytes, since a NaN is equal to nothing.
        right = expected is None or torch.equal(last.view(torch.uint8), expected.view(torch.uint8))
        taken = float(do_bench(lambda: way(product), warmup=_WARMUP, rep=_REPETITIONS)) if right else math.inf
    except Exception as error:  # whatever a library says that cannot
        torch.cuda.synchronize(product.codes.device)  # likewise
        logger.info("%s cannot multiply %s: %s", way, product.kind, error)
        return math.inf
    if not right:
        logger.warning("%s multiplies %s wrongly on this device, and is left out", way, product.kind)
    return taken


def _in_one(product: Product) -> Tensor:
    (tokens, size), out = product.codes.shape, len(product.ternary)
    y = product.result()
    counts = (tokens, out, size, tokens.bit_length(), size % _MOST_FEATURES == 0)
    launch("linear", partial(_tiles, tokens, out), *product[:-1], y, *counts)
    return y


def _tiles(tokens: int, out: int, tile: Mapping[str, int]) -> tuple[int]:
    return (-(-tokens // tile["ROWS"]) * -(-out // tile["COLUMNS"]),)


def _in_two(product: Product) -> Tensor:
    sums, y = integer_matmul(product.codes, product.ternary), product.result()
    tokens, out = sums.shape
    launch("dequantize", (tokens, -(-out // _PART)), sums, *product[2:-1], y, out, _PART)
    return y


def _hopper_ways(product: Product) -> dict[str, Way]:
    """A way for every tile of `hopper_product` that can make this product."""
    device = product.codes.device
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return {}
    if (programs := _hopper_programs()) is None:
        return {}
    in_lines = product.residual is None and product.dtype == torch.bfloat16
    return {
        f"hopper, {tile.rows}x{tile.columns}x{tile.features}": partial(_on_hopper, programs.linear, tile)
        for tile in programs.TILES
        if tile.coalesced == in_lines
    }


@cache
def _hopper_programs() -> ModuleType | None:
    """hopper_product, where this release of Triton has what it is written in, which is called experimental."""
    try:
        from bitnet_train.kernels import hopper_product
    except (ImportError, AttributeError) as error:
        logger.info("the product for Hopper is off: %s", error)
        return None
    return hopper_product


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _tiles_of(rows: int, features: int) -> Callable[[Tensor], Any]:
    """How the copy engine finds tiles of int8 in a matrix; their layout in shared memory is worked out once."""
    from triton.experimental.gluon.language import NVMMASharedLayout, int8
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [rows, features]
    layout = NVMMASharedLayout.get_default_for(block, int8)
    return lambda matrix: TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)


def _on_hopper(program: Any, tile: "Tile", product: Product) -> Tensor:
    (tokens, size), out = product.codes.shape, len(product.ternary)
    y = product.result()
    matrices = (
        _tiles_of(tile.rows, tile.features)(product.codes),
        _tiles_of(tile.columns, tile.features)(product.ternary),
    )
    most = tile.programs * _multiprocessors(y.device)
    grid = (min(most, -(-tokens // tile.rows) * -(-out // tile.columns)),)
    constants = (tile.rows, tile.columns, tile.features, tile.stages, tile.coalesced)
    options = {"num_warps": tile.warps, **ROUNDING} | ({"maxnreg": tile.registers} if tile.registers else {})
    program[grid](*matrices, *product[2:-1], y, tokens, out, size, *constants, **options)
    return y
