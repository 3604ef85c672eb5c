"""The int8 product of `gpu_product` for H100 and H200, in Gluon, Triton's lower level.

    y = (codes . ternary^T) column / scale + bias + residual

`tl.dot` waits for every integer product before the next step. Here one warp lets the copy engine bring tiles of both
matrices into shared memory, STAGES of them, and the other warps hand them to the tensor cores, which are waited for one
step later. A program walks over tiles of the result, so that the next tile is loaded while this one is stored.
`triton_kernels.py` says what holds of arrays and rounding. Past the end of a matrix the copy engine reads zeros.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


class Tile(NamedTuple):
    """Rows and columns of the result, features a step, stages, warps that multiply; programs and registers.

    Attributes:
        programs: how many share a multiprocessor.
        registers: of a thread on average; None leaves a program all.
        coalesced: whether results cross shared memory to be stored in whole lines; without a residual, in 2 bytes.
    """

    rows: int
    columns: int
    features: int
    stages: int
    warps: int
    programs: int
    registers: int | None
    coalesced: bool


# The fastest of six at 2B4T's shapes on an H200: which of two wins depends on the shape, and is tried.
TILES = (
    Tile(128, 256, 128, 3, 8, 1, None, True),
    Tile(128, 128, 64, 4, 4, 2, 128, True),
    Tile(128, 256, 128, 4, 8, 1, None, False),
    Tile(128, 128, 128, 3, 4, 2, 128, False),
)


@gluon.jit
def _place(tile, down, across, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and column of a tile: eight below each other before the next column of tiles, see `linear`."""
    first = tile // (8 * across) * 8
    height = gl.minimum(down - first, 8)
    return (first + tile % (8 * across) % height) * ROWS, tile % (8 * across) // height * COLUMNS


@gluon.jit
def _load(
    codes,
    ternary,
    stages,
    sizes,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads: a stage is filled once it is empty, and says itself that it is ready."""
    left, right, empty, ready = stages
    rows, out, size = sizes
    down, across = gl.cdiv(rows, ROWS), gl.cdiv(out, COLUMNS)
    at = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        m, n = _place(tile, down, across, ROWS, COLUMNS)
        for k in range(0, size, FEATURES):
            stage = at % STAGES
            mbarrier.wait(empty.index(stage), (at // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (ROWS + COLUMNS) * FEATURES)
            tma.async_copy_global_to_shared(codes, [m, k], ready.index(stage), left.index(stage))
            tma.async_copy_global_to_shared(ternary, [n, k], ready.index(stage), right.index(stage))
            at += 1


@gluon.jit
def _multiply(
    column,
    scale,
    bias,
    residual,
    y,
    stages,
    sizes,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
    COALESCED: gl.constexpr,
):
    """The warps that multiply: a stage is empty once the product after its own has begun."""
    left, right, empty, ready = stages
    rows, out, size = sizes
    down, across = gl.cdiv(rows, ROWS), gl.cdiv(out, COLUMNS)
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 32])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    last: gl.constexpr = lines if COALESCED else layout
    at = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        first_row, first_column = _place(tile, down, across, ROWS, COLUMNS)
        sums = warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.int32, layout))
        for k in range(0, size, FEATURES):
            stage = at % STAGES
            mbarrier.wait(ready.index(stage), at // STAGES & 1)
            sums = warpgroup_mma(left.index(stage), right.index(stage).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(sums,)))
            mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1, pred=k > 0)
            at += 1
        exact = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1)
        m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        n = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        step = gl.div_rn(1.0, gl.load(scale + m, m < rows, other=1.0))
        value = exact.to(gl.float32) * (gl.load(column + n, n < out, other=0.0)[None, :] * step[:, None])
        if bias is not None:
            value += gl.load(bias + n, n < out, other=0.0)[None, :]
        if COALESCED:
            value = gl.convert_layout(value.to(y.dtype.element_ty), lines)
        m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, last))
        n = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, last))
        where = m.to(gl.int64)[:, None] * out + n[None, :]
        inside = (m < rows)[:, None] & (n < out)[None, :]
        if residual is not None:
            value += gl.load(residual + where, inside, other=0.0).to(gl.float32)
        gl.store(y + where, value.to(y.dtype.element_ty), inside)


@gluon.jit
def linear(
    codes,
    ternary,
    column,
    scale,
    bias,
    residual,
    y,
    rows,
    out,
    size,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
    COALESCED: gl.constexpr,
):
    """All tiles of y; codes and ternary are descriptors of int8 matrices, bias and residual may be None."""
    left = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, FEATURES], codes.layout)
    right = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, FEATURES], ternary.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
        mbarrier.init(ready.index(stage), count=1)
    stages, sizes = (left, right, empty, ready), (rows, out, size)
    # One warp loads, with the fewest registers that there are.
    gl.warp_specialize(
        [
            (
                _multiply,
                (column, scale, bias, residual, y, stages, sizes, ROWS, COLUMNS, FEATURES, STAGES, COALESCED),
            ),
            (_load, (codes, ternary, stages, sizes, ROWS, COLUMNS, FEATURES, STAGES)),
        ],
        [1],
        [24],
    )
