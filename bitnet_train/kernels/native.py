"""The passes of native.cpp on CPU tensors: compiled once per machine by its C++ compiler, absent where it has none.

The library lies in `user_cache()` under a name made of the source, the compiler's command and version, the flags and
the processor, so that a home folder shared by different machines holds one for each. It is loaded where nobody else
can have written it (`own_files`); one that is not as it was compiled is compiled again. Where the cache is not the
user's alone (a container's user, a folder of a group), each process compiles its own in the temporary folder.
BITNET_TRAIN_NATIVE=0 in the environment turns it off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Container
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.kernels.own_files import open_own, own_folder, seal
from bitnet_train.kernels.tensors import FLOATS, ordinary, rows_of_heads
from bitnet_train.user_cache import user_cache

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
# No fast-math and no contraction: rounding is that of the formulas.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
ACTIVATIONS = {None: 0, "relu2": 1, "silu": 2}
ROW_BLOCKS = 64  # partial sums of a sum over rows: more than most machines have threads, whatever the number of rows

_LOADING = threading.Lock()  # one thread compiles, the others wait
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def available(*tensors: Tensor | None, dtypes: Container[torch.dtype] = FLOATS) -> bool:
    """True where native.cpp can work on these tensors: of such a dtype, on CPU, outside a compiled graph."""
    return ordinary(tensors, "cpu", dtypes) and library() is not None


def library() -> ctypes.CDLL | None:
    """The compiled library, or None, with a log line that says why."""
    with _LOADING:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        compiler = _compiler()
        if os.environ.get("BITNET_TRAIN_NATIVE") == "0" or not compiler or platform.system() != "Linux":
            logger.info("the C++ passes are off: the same is computed by torch, slower")
            return None
        # The descriptor stays open: the name must be no other library's as long as the process lives.
        loaded = ctypes.CDLL(f"/proc/self/fd/{_compiled(compiler)}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("no C++ passes from %s, torch computes the same, slower: %s", SOURCE.name, error)
        return None
    # A forked process has none of OpenMP's threads, and would wait for them, in torch's operations too.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    return loaded


def _compiler() -> list[str]:
    """The command of the C++ compiler, such as `ccache g++` from CXX; empty where there is none."""
    found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    try:
        return shlex.split(os.environ.get("CXX", "")) or [*islice(found, 1)]
    except ValueError as error:
        raise ValueError(f"CXX is no command ({error}): {os.environ['CXX']}") from None


def _compiled(compiler: list[str]) -> int:
    """A descriptor of the library for this source, compiler and processor; compiled where it is not there as it was."""
    try:
        cache = _own_cache()
    except OSError as error:
        logger.warning("the C++ passes are compiled at every start, and not kept: %s", error)
        return _compiled_for_now(compiler)
    path = cache / f"native-{_fingerprint(compiler)}.so"
    try:
        return open_own(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("the C++ passes are compiled again: %s", error)
    _compile(compiler, path)
    return open_own(path)


def _own_cache() -> Path:
    """The folder of the libraries. Raises OSError where others can change it, or there can be none."""
    cache = user_cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    return own_folder(cache)


def _compiled_for_now(compiler: list[str]) -> int:
    """A descriptor of a library without a name, for this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = own_folder(Path(folder)) / "native.so"
        _compile(compiler, path)
        return open_own(path)


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed into place: others may do the same
        built = Path(folder) / path.name
        command = [*compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        seal(built)
        built.replace(path)


def _fingerprint(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    processor = [line for line in cpuinfo if line.startswith(("model name", "flags", "Features", "CPU part"))]
    command = os.fsencode("\0".join([*compiler, *FLAGS]))
    parts = (SOURCE.read_bytes(), version, command, "\n".join(sorted(set(processor))).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a function of native.cpp: tensors as addresses, ints as int64, floats as float32."""
    loaded = library()
    assert loaded is not None
    loaded[name](*map(_argument, arguments))


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(value, Tensor):
        if not value.is_contiguous() or value.device.type != "cpu":
            raise ValueError(f"native.cpp reads contiguous tensors on CPU, got {value.stride()} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def _floats(*shape: int) -> Tensor:
    """Room for float32, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _vector(values: Tensor, size: int) -> Tensor:
    """A gain or a bias as the C++ reads it: float32, one value per feature."""
    return values.float().expand(size).contiguous()


def quantize(x: Tensor, weight: Tensor | None, eps: float, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Int8 codes of RMSNorm(source(x)), see `fused.quantize`: `(tokens, width)` to codes, scale and rms."""
    x = x.contiguous()
    tokens, size = len(x), x.shape[1] if activation is None else x.shape[1] // 2
    weight = None if weight is None else _vector(weight, size)
    codes = torch.empty(tokens, size, dtype=torch.int8, device="cpu")
    scale, rms = _floats(tokens, 1), _floats(tokens, 1)
    name = f"quantize_{_SUFFIX[x.dtype]}"
    _call(name, x, weight, tokens, size, float(eps), ACTIVATIONS[activation], codes, scale, rms)
    return codes, scale, rms


def dequantize(
    products: Tensor, column: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """products * column / scale + bias + residual in `dtype`, see `fused.dequantize`."""
    y = torch.empty(products.shape, dtype=dtype, device="cpu")
    tokens, size = products.shape
    bias = None if bias is None else _vector(bias, size)
    residual = None if residual is None else residual.to(dtype).expand(tokens, size).contiguous()
    _call(f"dequantize_{_SUFFIX[dtype]}", products, column, scale, bias, residual, tokens, size, y)
    return y


def scale_gradient(grad: Tensor, column: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad * column and the transpose of grad / scale in `dtype`, see `fused.scale_gradient`."""
    if grad.dtype == torch.bfloat16 and dtype == torch.float32:
        grad = grad.float()
    grad = grad.contiguous()
    tokens, size = grad.shape
    by_column = torch.empty(tokens, size, dtype=dtype, device="cpu")
    transposed = torch.empty(size, tokens, dtype=dtype, device="cpu")
    name = f"scale_gradient_{_SUFFIX[grad.dtype]}_{_SUFFIX[dtype]}"
    _call(name, grad, column, scale, tokens, size, by_column, transposed)
    return by_column, transposed


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rms: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm(source(x)) for x and for the gain, see `fused.norm_backward`."""
    if x.dtype == torch.bfloat16:
        grad = grad.bfloat16()
    x, grad, weight = x.contiguous(), grad.contiguous(), _vector(weight, grad.shape[1])
    tokens, size = grad.shape
    grad_x, partial = torch.empty_like(x), _floats(ROW_BLOCKS, size)
    name = f"norm_backward_{_SUFFIX[grad.dtype]}_{_SUFFIX[x.dtype]}"
    _call(name, grad, x, weight, rms, tokens, size, ACTIVATIONS[activation], ROW_BLOCKS, grad_x, partial)
    return grad_x, partial.sum(dim=0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turns heads `(batch, heads, seq, head_dim)` by sign times an angle, see `gpu.rotate`."""
    batch, heads, seq, dim = x.shape
    tokens, cos, sin = rows_of_heads(x), cos.contiguous(), sin.contiguous()
    y = torch.empty(batch, seq, heads, dim, dtype=x.dtype, device="cpu")
    counts = (batch * seq, tokens.stride(1), heads, dim // 2, len(cos) * seq)
    _call(f"rotate_{_SUFFIX[x.dtype]}", tokens.data_ptr(), cos, sin, sign, *counts, y)  # tokens: with gaps in between
    return y.transpose(1, 2)


class Window(NamedTuple):
    """Where the queries of a block look.

    starts: int64 `(queries,)`, the first position that each query sees; the last is its own.
    position: of the first query in its row of tokens.
    first: position of the first key.
    """

    starts: Tensor
    position: int
    first: int


def softmax_(scores: Tensor, factor: float, window: Window) -> Tensor:
    """Puts softmax(scores * factor) over what each query sees in the place of `(heads, groups * queries, keys)`.

    Returns:
        Its log-sum-exp, float32 `(heads, groups * queries)`.
    """
    heads, rows, keys = scores.shape
    lse = _floats(heads, rows)
    starts, position, first = window
    name = f"softmax_{_SUFFIX[scores.dtype]}"
    _call(name, scores, heads * rows, keys, float(factor), starts, len(starts), position, first, lse)
    return lse


def softmax_backward_(scores: Tensor, grad: Tensor, factor: float, window: Window, lse: Tensor) -> None:
    """Puts the probabilities in the place of the scores, and the gradient of the unscaled scores in that of `grad`."""
    heads, rows, keys = scores.shape
    starts, position, first = window
    name = f"softmax_backward_{_SUFFIX[scores.dtype]}"
    _call(name, scores, grad, heads * rows, keys, float(factor), starts, len(starts), position, first, lse)


def log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels under logits `(rows, vocab)`, and the log-sum-exp, float32 `(rows,)` each.

    Raises:
        IndexError: a label is not in [0, vocab).
    """
    rows, vocab = logits.shape
    if rows and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise IndexError(f"labels are in [{labels.min()}, {labels.max()}], the head has {vocab} rows")
    logps, lse, labels = _floats(rows), _floats(rows), labels.long().contiguous()
    _call(f"log_likelihood_{_SUFFIX[logits.dtype]}", logits, labels, rows, vocab, logps, lse)
    return logps, lse


def likelihood_gradient_(logits: Tensor, labels: Tensor, lse: Tensor, p_factor: Tensor, label_factor: Tensor) -> None:
    """Puts softmax * p_factor - onehot * label_factor in the place of the logits; factors float32 `(rows,)`."""
    rows, vocab = logits.shape
    labels = labels.long().contiguous()
    _call(f"likelihood_gradient_{_SUFFIX[logits.dtype]}", logits, labels, lse, p_factor, label_factor, rows, vocab)


def absolute_sums(weight: Tensor, block: int) -> Tensor:
    """sum |w| of every block of `block` weights, float64."""
    sums = torch.empty(-(-weight.numel() // block), dtype=torch.float64, device="cpu")
    _call(f"absolute_sums_{_SUFFIX[weight.dtype]}", weight, weight.numel(), block, sums)
    return sums


def ternary_codes(weight: Tensor, half: float) -> Tensor:
    """-1, 0 or 1 as int8: the comparison of weights with -half and half."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    _call(f"ternary_codes_{_SUFFIX[weight.dtype]}", weight, float(half), weight.numel(), codes)
    return codes


def integer_products(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 `(rows, in)` and `(out, in)` as int32 `(rows, out)`: for a few rows, since b is read once."""
    (rows, size), out = a.shape, len(b)
    products = torch.empty(rows, out, dtype=torch.int32, device="cpu")
    _call("integer_products", a.contiguous(), b.contiguous(), rows, out, size, products)
    return products


def pack_ternary(codes: Tensor, descending: bool) -> Tensor:
    """Codes int8 `(blocks, 4, width)` to uint8 `(blocks, width)`, see `formats.packing.four_in_a_byte`."""
    blocks, _, width = codes.shape
    packed = torch.empty(blocks, width, dtype=torch.uint8, device="cpu")
    _call("pack_ternary", codes, blocks, width, int(descending), packed)
    return packed


def unpack_ternary(packed: Tensor, descending: bool) -> tuple[Tensor, int]:
    """The inverse, and how many bytes hold a pair of bits that is no code."""
    blocks, width = packed.shape
    codes = torch.empty(blocks, 4, width, dtype=torch.int8, device="cpu")
    bad = torch.zeros(1, dtype=torch.int64, device="cpu")
    _call("unpack_ternary", packed, blocks, width, int(descending), codes, bad)
    return codes, int(bad)
