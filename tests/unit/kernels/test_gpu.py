"""The Triton programs against torch: on the GPU where there is one, else in Triton's interpreter on CPU.

The interpreter rounds to bfloat16 by cutting, hence the tolerances of that dtype.
"""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bitnet_train import fused
from bitnet_train.fused import Norm, normed_bit_linear, stack
from bitnet_train.kernels import gpu, gpu_product, native
from bitnet_train.losses import tokens
from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import absmean, row_sums, ternary_codes
from tests.passes import assert_codes_are_those_of_quant, rotations
from tests.support import ROOT, TINY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not gpu._compiles(), reason="no triton, C compiler or Python headers"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 5), (7, 123), (40, 128))  # tokens, features
ACTIVATIONS = (None, "relu2", "silu")


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "DEVICE", DEVICE)
    monkeypatch.setattr(native, "available", lambda *tensors, **options: False)
    from bitnet_train.kernels import triton_kernels

    # Nothing is timed in the interpreter; on CUDA two suffice to choose from, each of which takes seconds to compile.
    tiles = triton_kernels.TILES[-1:] if DEVICE == "cpu" else triton_kernels.TILES[-2:]
    monkeypatch.setattr(triton_kernels.linear, "configs", tiles)
    with torch.device(DEVICE):
        yield


def both(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of a call in Triton and in torch."""
    assert gpu.available(torch.zeros(1))
    compiled = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "available", lambda *tensors, **options: False)
        return compiled, call()


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.float().abs().max()))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2**-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_norm_and_quantisation(activation: str | None, dtype: torch.dtype, count: int, size: int) -> None:
    x = torch.randn(count, size if activation is None else 2 * size).to(dtype)
    norm, grad = Norm(torch.rand(size) + 0.5, 1e-5), torch.randn(count, size).to(dtype)
    compiled, eager = both(lambda: fused.quantize(x, norm, activation))
    assert (compiled[0].int() - eager[0].int()).abs().max() <= 1  # an ulp of the norm decides a tie now and then
    assert (compiled[0] != eager[0]).float().mean() < 2e-3
    assert_close(compiled[1:], eager[1:], 2e-6)
    gradients = both(lambda: gradients_of_norm(grad, x, norm, eager[2], activation))
    assert_close(*gradients, tolerance(dtype))


def gradients_of_norm(
    grad: Tensor, x: Tensor, norm: Norm, rms: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    to_x, to_gain = fused.norm_backward(grad, x, norm, rms, activation)
    assert to_gain is not None
    assert to_x.dtype == x.dtype
    return to_x, to_gain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "size"), [*SHAPES, (3, 4097)])
def test_quantisation_without_norm_is_that_of_quant(dtype: torch.dtype, count: int, size: int) -> None:
    assert_codes_are_those_of_quant(dtype, count, size)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_halves_round_to_even_and_what_is_not_finite_gives_no_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5], [float("nan"), 1, 2, 3, 4], [float("inf"), 1, -2, 3, 4]])
    codes, scale, _ = fused.quantize(x, None, None)
    assert codes.tolist() == [[127, 0, 2, -2, 126], [0] * 5, [0] * 5]
    assert scale[0, 0] == 127 * (torch.tensor(1.0) / 127)
    assert scale[1, 0].isnan()
    assert scale[2, 0] == 0


@pytest.fixture(params=["in one", "in two", "the faster"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How products are made."""
    if request.param != "the faster":
        chosen = gpu_product._in_one if request.param == "in one" else gpu_product._in_two
        monkeypatch.setattr(gpu_product, "_way", lambda product: chosen)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "out", "size"), [(1, 7, 5), (40, 70, 48), (70, 33, 123), (130, 64, 256), (300, 269, 272)]
)  # the last: sums of tiles, and what CUDA's own product takes, 272 columns
def test_products(dtype: torch.dtype, rows: int, out: int, size: int) -> None:
    codes, scale = torch.randint(-127, 128, (rows, size), dtype=torch.int8), torch.rand(rows, 1) * 100 + 1
    stacked = stack([torch.randn(out, size), torch.randn(3, size)])
    for bias in (None, torch.randn(out + 3)):
        for residual in (None, torch.randn(rows, out + 3).to(dtype)):
            call = (codes, scale, stacked, bias, residual, dtype)
            got, want = both(lambda call=call: (fused.linear(*call),))  # type: ignore[misc]
            assert got[0].dtype == dtype
            if dtype == torch.float32:
                assert torch.equal(got[0], want[0])  # exact sums, then the same three roundings
            else:
                assert_close(got, want, tolerance(dtype))
    for grad in (torch.randn(rows, out + 3), torch.randn(rows, out + 3).to(dtype)):
        gradients = both(lambda grad=grad: both_gradients(grad, codes, scale, stacked, dtype))  # type: ignore[misc]
        assert_close(*gradients, tolerance(dtype))


def both_gradients(
    grad: Tensor, codes: Tensor, scale: Tensor, stacked: fused.Stacked, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    to_v, to_weight = fused.linear_backward(grad, codes, scale, stacked, dtype, True)
    assert to_weight is not None
    assert fused.linear_backward(grad, codes, scale, stacked, dtype, False)[1] is None
    return to_v, to_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2560), (3, 6912), (2, 1024), (3, 1016), (3, 1001), (0, 64)])
def test_weights(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The sum of a row is that of torch to the last bit, on every device: no code depends on where it was made.

    Weights of one magnitude have an exact sum in float64, whatever the order: these are of many.
    """
    weight = (torch.randn(shape) * (8 * torch.randn(shape)).exp()).to(dtype)
    sums, expected = both(lambda: (row_sums(weight),))
    assert torch.equal(sums[0], expected[0])
    scale = absmean(torch.ones(1, 3) if 0 in shape else weight)
    weight.view(-1)[:1] = scale / 2  # a tie: no more than half
    codes, expected = both(lambda: (ternary_codes(weight, scale),))
    assert torch.equal(codes[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[1], [7], [40, 3], [5, 1, 1100]])
@pytest.mark.parametrize("size", [123, 1152])
def test_stacked_weights_are_those_of_quant(dtype: torch.dtype, rows: list[int], size: int) -> None:
    """Each matrix has its own scale, to the last bit, also where its magnitude is another's, zero or not finite."""
    weights = [(torch.randn(count, size) * 10.0 ** (2 * k)).to(dtype) for k, count in enumerate(rows)]
    weights[0][0, :3] = absmean(weights[0]) / 2  # a tie: no more than half
    if len(rows) == 2:
        weights[1].zero_()
    if len(rows) == 3:
        weights[1][0, 5] = float("inf")
    assert gpu.stacks(weights)
    got, want = both(lambda: stack(weights))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
    alone = torch.cat([absmean(weight).expand(len(weight)) for weight in weights])  # an export's scales are training's
    torch.testing.assert_close(got[1], alone, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_stacked() -> None:
    one, bfloat16 = torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bfloat16)
    for weights in ([one] * 4, [one, torch.ones(2, 9)], [one, bfloat16], [torch.ones(0, 8)], [torch.ones(1, 131)]):
        assert not gpu.stacks(weights)
    known = [torch.tensor(2.0), None]
    assert stack([one, one], known).column.tolist() == [2.0, 2.0, 1.0, 1.0]


def test_a_weight_in_bfloat16_against_a_threshold_between_two_of_its_values() -> None:
    weight, scale = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125]).bfloat16(), torch.tensor(2.0001)
    assert ternary_codes(weight, scale).tolist() == [0, 1, 0, -1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [77, 5000])
def test_likelihood(dtype: torch.dtype, vocab: int) -> None:
    logits, labels = (torch.randn(9, vocab) * 10).to(dtype), torch.randint(vocab, (9,))
    (logps, lse), eager = both(lambda: tokens._log_likelihood(logits, labels))
    assert_close((logps, lse), eager, 1e-5)
    factors = torch.rand(9), torch.rand(9)
    assert_close(*both(lambda: (tokens._gradient_(logits.clone(), labels, lse, *factors),)), tolerance(dtype))


@pytest.mark.filterwarnings("ignore:divide by zero|invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_likelihood_of_what_is_not_finite_is_that_of_torch() -> None:
    logits, labels = torch.randn(4, 40), torch.tensor([0, 5, 39, 3])
    logits[0, 7] = logits[1, 5] = float("inf")
    logits[2] = float("-inf")
    logits[3, 9] = float("nan")
    for got, want in zip(*both(lambda: tokens._log_likelihood(logits, labels)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_a_label_outside_of_the_head_has_no_likelihood() -> None:
    logps, lse = gpu.log_likelihood(torch.randn(2, 5), torch.tensor([0, 5]))
    assert logps.isnan().tolist() == [False, True]
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("seq", [7, 1])
def test_rotation(dtype: torch.dtype, batches: int, laid_out: bool, seq: int) -> None:
    got, want = both(rotations(dtype, seq, batches, laid_out))
    assert_close(got, want, tolerance(dtype))
    if dtype == torch.float32:
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_function_forward_and_backward(activation: str | None) -> None:
    sizes = (24, 40 if activation is None else 80)
    x, residual = torch.randn(sizes).requires_grad_(), torch.randn(24, 37).requires_grad_()
    weights = [torch.randn(out, 40, requires_grad=True) for out in (30, 7)]
    norm, bias = Norm((torch.rand(40) + 0.5).requires_grad_(), 1e-6), torch.randn(37).requires_grad_()
    inputs, grad = [x, residual, *weights, norm.weight, bias], torch.randn(24, 37)

    def run() -> tuple[Tensor, ...]:
        y = normed_bit_linear(x, weights, norm=norm, activation=activation, residual=residual, bias=bias)
        return y, *torch.autograd.grad(y, inputs, grad)

    assert_close(*both(run), 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_decoder_and_its_loss(autocast: bool) -> None:
    config = replace(TINY, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model, ids = BitNetForCausalLM(config), torch.randint(config.vocab_size, (1, 8))
    parameters = list(model.parameters())

    def run() -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            loss = cross_entropy_sum(model.model(ids), model.head_weight, ids, z_loss=1e-4)
        return loss, *torch.autograd.grad(loss, parameters)

    got, want = both(run)
    bound = 0.05 if autocast else 1e-3
    torch.testing.assert_close(got[0], want[0], rtol=bound / 10, atol=0)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a - b).norm() <= bound * b.norm()


class Trials:
    """Ways to make a product that take as many milliseconds as said; one of which nothing is said fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
        self.milliseconds, self.called = milliseconds, list[str]()
        for name in ("in_one", "in_two"):
            monkeypatch.setattr(gpu_product, f"_{name}", partial(self.way, name))
        hopper = {name: partial(self.way, name) for name in ("hopper", "hopper_2", "wrong")}
        monkeypatch.setattr(gpu_product, "_hopper_ways", lambda product: hopper)
        monkeypatch.setattr(gpu_product, "_FASTEST", {})
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr("triton.testing.do_bench", self.do_bench)

    def way(self, name: str, product: gpu_product.Product) -> Tensor:
        self.called.append(name)
        if name not in self.milliseconds:
            raise RuntimeError("out of resources")
        return torch.full((2, 8), 0.0 if name == "wrong" else float("nan"))

    def do_bench(self, call: Callable[[], object], **options: int) -> float:
        call()
        return self.milliseconds[self.called[-1]]

    def chosen(self, tokens: int = 20, size: int = 32, out: int = 8, address: int = 64) -> str:
        codes = Mock(device=torch.device("cuda"), shape=(tokens, size), __getitem__=lambda self, rows: self)
        codes.data_ptr.return_value = address
        one = torch.ones(1)
        gpu_product._way(gpu_product.Product(codes, torch.zeros(out, 8), one, one, None, None, torch.float32))(Mock())
        return self.called[-1]


def test_the_fastest_way_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(monkeypatch, in_two=3.0, hopper=2.0, hopper_2=1.0, wrong=0.5)
    assert trials.chosen(tokens=20) == "hopper_2"
    assert "in_one" not in trials.called  # many tiles, each of which takes seconds to compile
    tried = len(trials.called)
    assert trials.chosen(tokens=21) == "hopper_2"
    assert len(trials.called) == tried + 1
    trials.milliseconds["in_one"] = 1.0
    assert trials.chosen(size=40) == "in_two"  # rows that are not aligned
    assert trials.chosen(tokens=16) == trials.chosen(out=7) == "in_one"  # torch has no int8 product for these
    assert trials.chosen(address=72) == "in_one"  # the copy engine reads none that begins there


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({"in_two": 3.0, "in_one": 2.0, "wrong": 0.5}, "in_one"),
        ({"in_two": 1.0, "hopper": 2.0}, "in_two"),
        ({"in_two": 1.0}, "in_two"),
        ({"hopper": 2.0}, "hopper"),
    ],
)
def test_a_way_that_fails_or_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float], chosen: str
) -> None:
    assert Trials(monkeypatch, **milliseconds).chosen() == chosen


def test_a_device_that_has_failed_stops_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(monkeypatch, in_two=1.0)

    def synchronize(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trials.chosen()


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200")
@pytest.mark.parametrize("rows", [1, 17, 300, 4099])
@pytest.mark.parametrize(("out", "size"), [(8, 16), (269, 272), (2560, 6912)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_for_hopper(rows: int, out: int, size: int, dtype: torch.dtype) -> None:
    """More tiles than programs, tiles that end outside, one step and many."""
    codes, scale = torch.randint(-127, 128, (rows, size), dtype=torch.int8), torch.rand(rows, 1) * 100 + 1
    ternary, column = torch.randint(-1, 2, (out, size), dtype=torch.int8), torch.rand(out) + 0.5
    for bias in (None, torch.randn(out)):
        for residual in (None, torch.randn(rows, out).to(dtype)):
            product = gpu_product.Product(codes, ternary, column, scale, bias, residual, dtype)
            ways = gpu_product._hopper_ways(product)
            assert len(ways) == 2
            for name, way in ways.items():
                assert torch.equal(way(product), gpu_product._in_two(product)), name


def test_strides_do_not_matter() -> None:
    codes, scale = torch.randint(-127, 128, (64, 20), dtype=torch.int8), torch.rand(20, 1) + 1
    stacked, column = stack([torch.randn(6, 64)]), torch.rand(1).expand(6)
    got = gpu_product.linear(codes.t(), stacked.codes, column, scale, None, None, torch.float32)
    assert torch.equal(
        got, gpu_product.linear(codes.t().contiguous(), stacked.codes, column.clone(), scale, None, None, got.dtype)
    )
    assert torch.equal(gpu.expand(codes.t(), scale, torch.float32), codes.t() * scale)


def test_rows_too_long_are_left_to_torch() -> None:
    assert gpu.available(torch.zeros(1), size=gpu.LARGEST_ROW)
    assert not gpu.available(torch.zeros(1), size=gpu.LARGEST_ROW + 1)
    assert not gpu.available(torch.zeros(1, dtype=torch.float64))


def test_without_python_s_headers_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gpu._compiles()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme=None: str(tmp_path))
    assert not gpu._compiles()


@pytest.mark.parametrize(("name", "value"), [("BITNET_TRAIN_NATIVE", "0"), ("CC", "no-such-compiler")])
def test_switched_off_or_without_a_compiler(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    gpu._installed.cache_clear()
    try:
        assert not gpu.available(torch.zeros(1))
    finally:
        monkeypatch.undo()
        gpu._installed.cache_clear()


def test_what_ptxas_makes_of_the_programs(tmp_path: Path) -> None:
    """Compiled for an H200, here: int8 tensor cores, hardly a spilled register, no two roundings in one."""
    command = [sys.executable, str(ROOT / "tests" / "compiled_programs.py")]
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    programs = [json.loads(line) for line in done.stdout.splitlines()]
    assert {program["name"] for program in programs} >= {"quantize", "norm_backward", "linear", "hopper linear"}
    for program in programs:
        product = program["name"] in ("linear", "hopper linear")
        # What is added to a tile meets it at the end; the longest rows are held whole.
        more = product and not {"residual", "bias"} <= program.keys()
        spills = more or program.get("BLOCK") == gpu.LARGEST_ROW
        assert program["local_bytes"] <= (1024 if spills else 64), program
        assert program["shared_bytes"] <= (227 if product else 99) * 1024, program
        if product or program["name"] in ("quantize", "norm_backward", "dequantize", "expand", "rotate"):
            assert program["fused_multiply_adds"] == 0, program
        if product:
            assert program["int8_products"] > 0, program
