"""The C++ passes: bit for bit or within float32 rounding what torch computes, on any shape and number of threads."""

import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet_train import fused
from bitnet_train.formats.packing import four_in_a_byte, four_of_a_byte
from bitnet_train.fused import Norm
from bitnet_train.kernels import native
from bitnet_train.kernels.integer_matmul import integer_matmul
from bitnet_train.losses import tokens
from bitnet_train.quant import absmean, row_sums, ternary_codes
from tests.passes import assert_codes_are_those_of_quant, rotations

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 5), (7, 123), (64, 128), (200, 509))  # tokens, features: odd, prime, a whole tile, several
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Inside its context the passes run in torch."""
    return monkeypatch


def both(monkeypatch: pytest.MonkeyPatch, call: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of a call in C++ and in torch."""
    assert callable(call)
    compiled = call()
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda *tensors, **options: False)
        eager = call()
    return compiled, eager


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short source in the place of native.cpp, and an empty cache."""
    path = tmp_path / "native.cpp"
    path.write_text("int number = 1;\n")
    monkeypatch.setattr(native, "SOURCE", path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return path


@pytest.mark.parametrize("activation", [None, "relu2", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_norm_and_quantisation(
    in_torch: pytest.MonkeyPatch, activation: str | None, dtype: torch.dtype, count: int, size: int
) -> None:
    x = torch.randn(count, size if activation is None else 2 * size).to(dtype)
    norm, grad = Norm(torch.rand(size) + 0.5, 1e-5), torch.randn(count, size).to(dtype)
    compiled, eager = both(in_torch, lambda: fused.quantize(x, norm, activation))
    assert (compiled[0].int() - eager[0].int()).abs().max() <= 1  # an ulp of the norm decides a tie now and then
    assert (compiled[0] != eager[0]).float().mean() < 1e-3
    for got, want in zip(compiled[1:], eager[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    gradients = both(in_torch, lambda: fused.norm_backward(grad, x, norm, eager[2], activation))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_quantisation_without_norm_is_that_of_quant(dtype: torch.dtype, count: int, size: int) -> None:
    assert_codes_are_those_of_quant(dtype, count, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_scales_of_both_directions(in_torch: pytest.MonkeyPatch, dtype: torch.dtype, count: int, size: int) -> None:
    products = torch.randint(-20000, 20000, (count, size), dtype=torch.int32)
    column, scale = torch.rand(size), torch.rand(count, 1) * 100
    for bias in (None, torch.randn(size)):
        for residual in (None, torch.randn(count, size).to(dtype)):
            outputs = both(
                in_torch, lambda b=bias, r=residual: (fused.dequantize(products, column, scale, b, r, dtype),)
            )
            assert torch.equal(outputs[0][0], outputs[1][0])
    for grad_dtype in DTYPES:
        grad = torch.randn(count, size).to(grad_dtype)
        compiled, eager = both(in_torch, lambda g=grad: fused.scale_gradient(g, column, scale, dtype))
        for got, want in zip(compiled, eager, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("seq", [7, 1])
def test_rotation(in_torch: pytest.MonkeyPatch, dtype: torch.dtype, batches: int, laid_out: bool, seq: int) -> None:
    compiled, eager = both(in_torch, rotations(dtype, seq, batches, laid_out))
    assert torch.equal(compiled[0], eager[0])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # torch rounds both terms of the gradient to bfloat16
    torch.testing.assert_close(compiled[1], eager[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 1000, 300_001])
def test_weights(in_torch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    weight = torch.randn(count).to(dtype)
    scale = absmean(weight)
    weight[0] = scale / 2  # a tie: no more than half
    compiled, eager = both(in_torch, lambda: (absmean(weight), ternary_codes(weight, scale)))
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(("blocks", "width"), [(1, 1), (1, 9001), (7, 32), (0, 32)])
def test_codes_and_bytes(in_torch: pytest.MonkeyPatch, descending: bool, blocks: int, width: int) -> None:
    codes = torch.randint(-1, 2, (blocks, 4, width), dtype=torch.int8)
    packed, expected = both(in_torch, lambda: (four_in_a_byte(codes, descending),))
    assert torch.equal(packed[0], expected[0])
    for unpacked in both(in_torch, lambda: (four_of_a_byte(packed[0], descending),)):
        assert torch.equal(unpacked[0], codes)


@pytest.mark.parametrize("place", [0, 2, 4, 6])
def test_a_pair_of_bits_that_is_no_code_is_found(in_torch: pytest.MonkeyPatch, place: int) -> None:
    packed = torch.full((2, 5000), 0b10_01_00_10, dtype=torch.uint8)
    packed[1, 4999] |= 3 << place
    for available in (native.available, lambda *tensors, **options: False):
        in_torch.setattr(native, "available", available)
        with pytest.raises(ValueError, match="got 3"):
            four_of_a_byte(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 255, 1001])
def test_the_sum_of_a_row_depends_on_no_other_row(
    in_torch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int
) -> None:
    """Nor on where it lies in memory: shards, also empty ones, have the sums of the whole matrix to the last bit."""
    weight = torch.randn(23, columns).to(dtype)
    parts = [part.clone() for part in (*weight.split(5), weight[:0])]
    for sums, of_parts in both(in_torch, lambda: (row_sums(weight), torch.cat([row_sums(part) for part in parts]))):
        assert torch.equal(of_parts, sums)
        assert torch.allclose(sums, weight.double().abs().sum(dim=1), rtol=1e-14, atol=0.0)


@pytest.mark.gpu
def test_sums_of_rows_are_the_same_on_a_gpu(in_torch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 1001)
    _, eager = both(in_torch, lambda: (row_sums(weight),))
    assert torch.equal(row_sums(weight.cuda()).cpu(), eager[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_likelihood(in_torch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    logits, labels = (torch.randn(9, 77) * 10).to(dtype), torch.randint(77, (9,))
    (logps, lse), eager = both(in_torch, lambda: tokens._log_likelihood(logits, labels))
    torch.testing.assert_close(logps, eager[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, eager[1], rtol=1e-6, atol=1e-6)
    factors = torch.rand(9), torch.rand(9)
    gradients = both(in_torch, lambda: (tokens._gradient_(logits.clone(), labels, lse, *factors),))
    torch.testing.assert_close(
        gradients[0][0], gradients[1][0], rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6
    )


def test_any_gain_and_any_default_dtype(in_torch: pytest.MonkeyPatch) -> None:
    """A bfloat16 or strided gain, and a default dtype that is not float32, reach the C++ as what it reads."""
    x, gain = torch.randn(6, 40), torch.rand(80).bfloat16()[::2] + 0.5
    compiled, eager = both(in_torch, lambda: fused.quantize(x, Norm(gain, 1e-5), None))
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1)
    torch.set_default_dtype(torch.float64)
    try:
        again = fused.quantize(x, Norm(gain, 1e-5), None)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(again, compiled, strict=True):
        assert torch.equal(got, want)


NO_FOLDER = "/proc/self/none"


def library_file(folder: Path) -> Path:
    """The only library of a cache, compiled from `source`."""
    os.close(native._compiled(["c++"]))
    (file,) = (folder / "bitnet_train").iterdir()
    return file


def by_a_wide_mode(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    cache.chmod(0o2777)


def by_another_owner(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root in a container, with the cache of the user outside."""
    cache.mkdir()
    os.chown(cache, 12345, 12345)


def by_a_path_without_folders(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", NO_FOLDER)  # as root, no mode is read-only


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (by_a_wide_mode, "bitnet_train can be written by others: chmod go-w"),
        pytest.param(
            by_another_owner,
            "bitnet_train belongs to another user; set XDG_CACHE_HOME to a folder of your own",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away"),
        ),
        (by_a_path_without_folders, f"No such file or directory: '{NO_FOLDER}"),
    ],
)
def test_where_the_cache_is_not_ones_own_the_library_is_for_this_process(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path, pytest.MonkeyPatch], object],
    message: str,
) -> None:
    harm(tmp_path / "bitnet_train", monkeypatch)
    loaded = ctypes.CDLL(f"/proc/self/fd/{native._compiled(['c++'])}")
    assert ctypes.c_int.in_dll(loaded, "number").value == 1
    assert len(caplog.messages) == 1
    assert "compiled at every start" in caplog.messages[0]
    assert message in caplog.messages[0]
    assert not [*(tmp_path / "bitnet_train").glob("*")]


def test_a_temporary_folder_of_others_has_no_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "open"))
    with pytest.raises(PermissionError, match="/open can be written by others"):
        native._compiled_for_now(["c++"])


def by_a_link(file: Path) -> None:
    file.rename(file.with_suffix(".other"))
    file.symlink_to(file.with_suffix(".other"))


def another_library(file: Path) -> None:
    """As N07: it loads, and has none of the functions."""
    source = file.with_name("other.c")
    source.write_text("int x;")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(file), str(source)], check=True)


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (by_a_link, "Too many levels of symbolic links"),
        (another_library, "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: os.truncate(file, 4096), "is damaged"),  # loaded, it would end the process with SIGBUS
        (lambda file: file.chmod(0o777), "can be written by others"),
        (a_pipe, "is no file"),
    ],
)
def test_a_library_that_is_not_as_it_was_compiled_is_compiled_again(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], object], message: str
) -> None:
    file = library_file(tmp_path)
    harm(file)
    loaded = ctypes.CDLL(f"/proc/self/fd/{native._compiled(['c++'])}")
    assert ctypes.c_int.in_dll(loaded, "number").value == 1
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]
    assert not file.is_symlink()


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 16])
@pytest.mark.parametrize(("out", "size"), [(1, 1), (5, 3), (3, 257), (40, 6912)])
def test_products_of_a_few_rows_are_exact(rows: int, out: int, size: int) -> None:
    """The largest sums, and any; rows with gaps in between."""
    a = torch.randint(-127, 128, (rows, 2 * size), dtype=torch.int8)[:, :size]
    b = torch.randint(-1, 2, (out, size), dtype=torch.int8)
    b[0], a[0] = 1, -127
    assert torch.equal(native.integer_products(a, b).long(), a.long() @ b.long().t())


def test_a_few_rows_are_multiplied_by_native(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(2, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
    monkeypatch.setattr(native, "integer_products", lambda a, b: torch.full((2, 3), 7))
    assert integer_matmul(a, b).eq(7).all()
    assert integer_matmul(a.repeat(16, 1), b).eq(8).all()


def test_labels_outside_of_the_head_are_refused() -> None:
    with pytest.raises(IndexError, match=r"labels are in \[0, 5\], the head has 5 rows"):
        native.log_likelihood(torch.randn(2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_likelihood_of_what_is_not_finite_is_that_of_torch(in_torch: pytest.MonkeyPatch, value: float) -> None:
    logits, labels = torch.randn(3, 40), torch.tensor([0, 5, 39])
    logits[0, 7] = logits[1, 5] = value
    logits[2] = value
    for got, want in zip(*both(in_torch, lambda: tokens._log_likelihood(logits, labels)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_exp_over_its_whole_range() -> None:
    """softmax of (x, 0): the first probability is e^x / (e^x + 1)."""
    x = torch.cat((torch.linspace(-120, 20, 4001), torch.tensor([-200.0, -87.5, 0.0])))
    logits = torch.stack((x, torch.zeros_like(x)), dim=1)
    logps, _ = native.log_likelihood(logits, torch.ones(len(x), dtype=torch.int64))
    torch.testing.assert_close(logps, -torch.nn.functional.softplus(x), rtol=3e-6, atol=3e-7)


SUMS = """
import torch
from bitnet_train.kernels import native
torch.set_num_threads({threads})
torch.manual_seed(0)
x, weight, grad = torch.randn(333, 257), torch.rand(257), torch.randn(333, 257)
codes, scale, rms = native.quantize(x, weight, 1e-5, None)
grads = native.norm_backward(grad, x, weight, rms, None)
print([float(t.double().sum()) for t in (codes, scale, rms, *grads, native.absolute_sums(x.flatten(), 1000))])
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", SUMS.format(threads=threads)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for threads in (1, 2, 3)
    ]
    assert outputs[0] == outputs[1] == outputs[2]


def test_threads_that_ask_at_once_compile_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile(compiler: list[str]) -> int:
        compiled.append(original(compiler))
        return compiled[-1]

    original = native._compiled
    monkeypatch.setattr(native, "_compiled", compile)
    native._load.cache_clear()
    try:
        with ThreadPoolExecutor(3) as pool:
            assert len({library._name for library in pool.map(lambda _: native.library(), range(3)) if library}) == 1
    finally:
        native._load.cache_clear()
    assert len(compiled) == 1


def test_a_forked_process_computes() -> None:
    weight, before = torch.randn(1 << 20), torch.get_num_threads()
    torch.set_num_threads(2)
    expected = native.absolute_sums(weight, 1 << 17)  # OpenMP has its threads now, and a fork takes none along
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(not torch.equal(native.absolute_sums(weight, 1 << 17), expected))
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


def test_a_compiler_may_be_a_command_of_several_words(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C c++")
    os.close(native._compiled(native._compiler()))


def test_one_library_per_source_and_compiler(source: Path, tmp_path: Path) -> None:
    def compiled(compiler: str) -> set[str]:
        os.close(native._compiled([compiler]))
        return {path.name for path in (tmp_path / "bitnet_train").iterdir()}

    first = compiled("c++")
    assert len(first) == 1
    assert compiled("c++") == first
    source.write_text("int number = 2;\n")
    assert len(compiled("c++")) == 2
    assert len(compiled("g++")) == 3


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"BITNET_TRAIN_NATIVE": "0"}, None),
        ({"CXX": "/bin/false"}, "returned non-zero exit status 1"),
        ({"CXX": "g++ 'x"}, "CXX is no command (No closing quotation): g++ 'x"),
        ({"CXX": "/no/compiler"}, "No such file or directory: '/no/compiler'"),
    ],
)
def test_without_a_working_compiler_torch_computes(
    environment: dict[str, str],
    warning: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native._load.cache_clear()
    try:
        assert native.library() is None
        assert not native.available(torch.randn(2, 2))
        assert fused.quantize(torch.ones(2, 3), None, None)[0].eq(127).all()
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == (warning is not None)
        assert all(warning is not None and warning in text for text in warnings)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
