"""The programs of `gpu`, in Triton: what native.cpp does on CPU.

Arrays are row-major and contiguous; x, y, w, grad and logits are float32 or bfloat16, sums run in float32. BLOCK is a
power of two. A program owns whole rows, or whole tiles of the result, so that no result depends on how the device
spreads them. Rounding is that of quant.py: launched with `gpu.ROUNDING`, since a * b + c in one rounding moves codes,
and with div_rn and sqrt_rn where `/`, an approximation, would. Rows are counted in int64: a matrix may have more than
2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _source(row, i, inside, size, ACTIVATION: tl.constexpr):
    """What is normalised, float32 (BLOCK,): x itself, or act(gate) * up for a row that holds gate, then up."""
    first = tl.load(row + i, inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu2":
        positive = tl.where(first < 0.0, 0.0, first)  # a NaN stays one
        first = positive * positive * tl.load(row + size + i, inside, other=0.0).to(tl.float32)
    elif ACTIVATION == "silu":
        first = first * _sigmoid(first) * tl.load(row + size + i, inside, other=0.0).to(tl.float32)
    return first


@triton.jit
def _store_source_gradient(grad, row, to, i, inside, size, ACTIVATION: tl.constexpr):
    """The gradient of `_source`, in the layout of its row."""
    element = to.dtype.element_ty
    if ACTIVATION is None:
        tl.store(to + i, grad.to(element), inside)
    else:
        gate = tl.load(row + i, inside, other=0.0).to(tl.float32)
        up = tl.load(row + size + i, inside, other=0.0).to(tl.float32)
        if ACTIVATION == "relu2":
            positive = tl.where(gate < 0.0, 0.0, gate)
            slope, value = 2.0 * positive, positive * positive
        else:
            s = _sigmoid(gate)
            slope, value = s * (1.0 + gate * (1.0 - s)), gate * s
        tl.store(to + i, (grad * up * slope).to(element), inside)
        tl.store(to + size + i, (grad * value).to(element), inside)


@triton.jit
def quantize(x, weight, codes, scale, rms, size, eps, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """A row: codes = round(127 v / max |v|) with v = RMSNorm(source(x)), or source(x) where weight is None."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    width = size if ACTIVATION is None else 2 * size
    v = _source(x + t * width, i, inside, size, ACTIVATION)
    if weight is not None:
        mean = tl.div_rn(tl.sum(v * v, axis=0), size * 1.0)
        r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(rms + t, r)
        v = v * r * tl.load(weight + i, inside, other=0.0)
    # The bits of |v| order like |v| itself, with inf and NaN on top.
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    absmax = largest.to(tl.float32, bitcast=True)
    s = 127.0 * tl.div_rn(1.0, tl.where(absmax < 1e-5, 1e-5, absmax))  # quant.INT8_MAX, quant.ACTIVATION_EPS
    tl.store(scale + t, s)
    shift = 12582912.0  # 1.5 * 2^23: its unit in the last place is 1, so that adding it rounds half to even
    rounded = tl.where(largest < 0x7F800000, (v * s + shift) - shift, 0.0)
    tl.store(codes + t * size + i, rounded.to(tl.int8), inside)


@triton.jit
def norm_backward(
    grad,
    x,
    weight,
    rms,
    grad_x,
    partial,
    rows,
    size,
    height,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`height` rows: the gradient of RMSNorm(source(x)) to x, and the sum of theirs to the gain, a row of partial."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < size
    width = size if ACTIVATION is None else 2 * size
    gain = tl.load(weight + i, inside, other=0.0)
    sums = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, height, num_stages=STAGES):  # with 2 the next row is read meanwhile
        t = block.to(tl.int64) * height + k
        here = inside & (t < rows)
        r = tl.load(rms + t, t < rows, other=0.0)
        g = tl.load(grad + t * size + i, here, other=0.0).to(tl.float32)
        normal = _source(x + t * width, i, here, size, ACTIVATION) * r
        product = g * normal
        sums += product
        mean = tl.div_rn(tl.sum(product * gain, axis=0), size * 1.0)
        to_source = r * (g * gain - normal * mean)
        _store_source_gradient(to_source, x + t * width, grad_x + t * width, i, here, size, ACTIVATION)
    tl.store(partial + block.to(tl.int64) * size + i, sums, inside)


# Tiles of the product: rows and columns of the result, features per step, then warps and stages of the pipeline. The
# device's fastest is found by trying; the sums are exact, so that the choice changes no bit. Triton waits for an int8
# product before the next step: long steps, or tiles of which two fit a multiprocessor.
TILES = [
    triton.Config({"ROWS": 128, "COLUMNS": 128, "FEATURES": 256}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 128, "COLUMNS": 256, "FEATURES": 256}, num_warps=8, num_stages=2),
    triton.Config({"ROWS": 128, "COLUMNS": 256, "FEATURES": 128}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 256, "COLUMNS": 128, "FEATURES": 128}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 128, "COLUMNS": 128, "FEATURES": 128}, num_warps=8, num_stages=4),
    triton.Config({"ROWS": 128, "COLUMNS": 128, "FEATURES": 128}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 64, "COLUMNS": 128, "FEATURES": 128}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 64, "COLUMNS": 64, "FEATURES": 64}, num_warps=4, num_stages=3),
]


@triton.autotune(configs=TILES, key=["out", "size", "magnitude"])
@triton.jit
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
    magnitude,  # of the number of rows: a new number of rows alone is no reason to try the tiles again
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A tile of y = (codes . ternary^T) column / scale + bias + residual; bias and residual may be None."""
    # Eight tiles below each other before the next column of tiles: they read the same weights from the second cache.
    tile, down, across = tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(out, COLUMNS)
    first = tile // (8 * across) * 8
    height = min(down - first, 8)
    m = (first + tile % (8 * across) % height) * ROWS + tl.arange(0, ROWS)
    n = (tile % (8 * across) // height) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, FEATURES)
    # Rows past the end are those at the beginning again: nothing is read outside, and they are not stored.
    a = codes + (m % rows).to(tl.int64)[:, None] * size + k[None, :]
    b = ternary + (n % out).to(tl.int64)[None, :] * size + k[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, size, FEATURES):
        if WHOLE:
            sums += tl.dot(tl.load(a + start), tl.load(b + start), out_dtype=tl.int32)
        else:
            left = tl.load(a + start, (k < size - start)[None, :], other=0)
            right = tl.load(b + start, (k < size - start)[:, None], other=0)
            sums += tl.dot(left, right, out_dtype=tl.int32)
    inside = (m < rows)[:, None] & (n < out)[None, :]
    step = tl.div_rn(1.0, tl.load(scale + m, m < rows, other=1.0))
    value = sums.to(tl.float32) * (tl.load(column + n, n < out, other=0.0)[None, :] * step[:, None])
    if bias is not None:
        value += tl.load(bias + n, n < out, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * out + n[None, :]
    if residual is not None:
        value += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def dequantize(products, column, scale, bias, residual, y, out, BLOCK: tl.constexpr):
    """A part of a row: y = products column / scale + bias + residual; bias and residual may be None."""
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside, step = t * out + n, n < out, tl.div_rn(1.0, tl.load(scale + t))
    value = tl.load(products + at, inside, other=0).to(tl.float32) * (tl.load(column + n, inside, other=0.0) * step)
    if bias is not None:
        value += tl.load(bias + n, inside, other=0.0)
    if residual is not None:
        value += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def expand(codes, factor, y, size, BLOCK: tl.constexpr):
    """A part of a row: codes * factor, one factor per row."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(codes + row * size + i, i < size, other=0).to(tl.float32) * tl.load(factor + row)
    tl.store(y + row * size + i, value.to(y.dtype.element_ty), i < size)


@triton.jit
def _start_of_row(a, b, c, row, second, third, size):
    """Where a row begins of three matrices below each other, of which b begins with row `second`, c with `third`."""
    start = a + row * size
    if row >= second:
        start = b + (row - second) * size
    if row >= third:
        start = c + (row - third) * size
    return start


@triton.jit
def absolute_sums(
    a,
    b,
    c,
    sums,
    second,
    third,
    size,
    odd,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: sum |w|, float64, its right half added to its left until one is left; size = odd 2^HALVINGS."""
    row = tl.program_id(0).to(tl.int64)
    start = _start_of_row(a, b, c, row, second, third, size)
    piece, i = tl.arange(0, 2**HALVINGS)[:, None], tl.arange(0, BLOCK)[None, :]
    value = tl.abs(tl.load(start + piece * odd + i, i < odd, other=0.0).to(tl.float64))
    for halving in tl.static_range(HALVINGS):
        value = tl.sum(tl.reshape(value, (2, 2 ** (HALVINGS - 1 - halving), BLOCK)), axis=0)
    columns = odd
    while columns > 1:
        half = (columns + 1) // 2
        right = tl.gather(value, tl.minimum(i + half, BLOCK - 1), axis=1)
        value += tl.where(i + half < columns, right, 0.0)
        columns = half
    tl.store(sums + row + i, value, i < 1)


@triton.jit
def absmeans(sums, scales, second, third, rows, size, BLOCK: tl.constexpr):
    """A matrix: g = max(mean |w|, 1e-5), float32, of the sums of its rows."""
    number = tl.program_id(0)
    first = tl.where(number == 0, 0, tl.where(number == 1, second, third))
    last = tl.where(number == 0, second, tl.where(number == 1, third, rows))
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        total += tl.load(sums + start + i, i < last - start, other=0.0)
    mean = tl.sum(total, axis=0) / ((last - first).to(tl.float64) * size)
    scale = mean.to(tl.float32)
    tl.store(scales + number, tl.where(scale < 1e-5, 1e-5, scale))  # quant.WEIGHT_EPS; a NaN stays one


@triton.jit
def _code(value, half):
    """-1 where a weight is below -half, 1 where it is above half, else 0."""
    return (value > half).to(tl.int8) - (value < -half).to(tl.int8)


@triton.jit
def stacked_codes(a, b, c, scales, codes, column, second, third, size, BLOCK: tl.constexpr):
    """A part of a row of matrices below each other: the codes of w with half = g / 2; and the row's g."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = tl.load(scales + (row >= second).to(tl.int32) + (row >= third).to(tl.int32))
    i = part * BLOCK + tl.arange(0, BLOCK)
    start = _start_of_row(a, b, c, row, second, third, size)
    value = tl.load(start + i, i < size, other=0.0).to(tl.float32)
    tl.store(codes + row * size + i, _code(value, scale * 0.5), i < size)
    if part == 0:
        tl.store(column + row, scale)


@triton.jit
def ternary_codes(w, half, codes, count, BLOCK: tl.constexpr):
    """A part of an array: the codes of w."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(w + i, i < count, other=0.0).to(tl.float32)
    tl.store(codes + i, _code(value, tl.load(half)), i < count)


@triton.jit
def log_likelihood(logits, labels, logps, lse, vocab, BLOCK: tl.constexpr):
    """A row: log-probability of its label under softmax(logits), NaN for a label outside, and the log-sum-exp."""
    t = tl.program_id(0).to(tl.int64)
    row, label = logits + t * vocab, tl.load(labels + t)
    i = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        value = tl.load(row + start + i, i < vocab - start, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value)
    top = tl.max(largest, axis=0)
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)  # inf - inf would be NaN
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        value = tl.load(row + start + i, i < vocab - start, other=float("-inf")).to(tl.float32)
        total += tl.exp(value - shift)
    sum_of_all = shift + tl.log(tl.sum(total, axis=0))
    chosen = tl.load(row + label, (label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    tl.store(lse + t, sum_of_all)
    tl.store(logps + t, chosen - sum_of_all)


@triton.jit
def likelihood_gradient(logits, labels, lse, p_factor, label_factor, vocab, BLOCK: tl.constexpr):
    """A part of a row: logits <- softmax(logits) * p_factor - onehot(label) * label_factor."""
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + t * vocab + i
    p = tl.exp(tl.load(at, i < vocab, other=0.0).to(tl.float32) - tl.load(lse + t)) * tl.load(p_factor + t)
    value = tl.where(i == tl.load(labels + t), p - tl.load(label_factor + t), p)
    tl.store(at, value.to(logits.dtype.element_ty), i < vocab)


@triton.jit
def rotate(
    x,
    cos,
    sin,
    y,
    stride,
    heads,
    half,
    positions,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The heads of a token, `stride` elements after those before it, turned by the angle of its position times sign."""
    t = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (i < half)
    angle = t % positions * 2 * half + i
    c, s = tl.load(cos + angle, i < half, other=0.0), sign * tl.load(sin + angle, i < half, other=0.0)
    at = x + t * stride + head * 2 * half + i
    first, second = tl.load(at, inside, other=0.0).to(tl.float32), tl.load(at + half, inside, other=0.0).to(tl.float32)
    to = y + (t * heads + head) * 2 * half + i
    tl.store(to, (first * c - second * s).to(y.dtype.element_ty), inside)
    tl.store(to + half, (second * c + first * s).to(y.dtype.element_ty), inside)
