"""Each pass of a BitLinear by itself: in C++ (CPU) or Triton (CUDA) against torch, milliseconds and GB/s.

    python tools/benchmark_passes.py                                 # 2b4t's layer, 1,024 tokens
    python tools/benchmark_passes.py --tokens 16384 --rounds 21      # on a GPU

The two take turns; the ratio, torch's time over ours, is taken within a round. GB/s is what the pass has to read and
write once, over our time: near the memory's rate there is nothing left to gain. For the product it is TOP/s, and "in
torch" means torch's own int8 product and a pass behind it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch

from benchmark_step import passes_in_torch
from benchmarking import Spread, context_line, median_milliseconds, ratios, write_results
from bitnet_train import fused
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.fused import Norm, stack
from bitnet_train.losses import tokens as loss
from bitnet_train.model.rope import rotate, rotation
from bitnet_train.options import integer
from bitnet_train.quant import quantize_weight

_ROUND = 10  # milliseconds of a round on CUDA


@dataclass(frozen=True)
class Pass:
    """A call, and its work: bytes that it must move, or operations of a product."""

    name: str
    call: Callable[[], object]
    work: float
    unit: str = "GB/s"


def passes(tokens: int, hidden: int, inner: int, vocab: int, device: str) -> Iterator[Pass]:
    """The passes of a layer of these sizes, in the dtypes of bf16 autocast."""
    with torch.device(device):
        stream, gate_up = torch.randn(tokens, hidden), torch.randn(tokens, 2 * inner).bfloat16()
        grad, wide = torch.randn(tokens, hidden).bfloat16(), torch.randn(tokens, inner).bfloat16()
        gains = Norm(torch.ones(hidden), 1e-5), Norm(torch.ones(inner), 1e-5)
        weights = [torch.randn(inner, hidden) for _ in range(2)]
        heads = torch.randn(1, tokens, hidden).bfloat16().unflatten(-1, (-1, 128)).transpose(1, 2)
        by = rotation(torch.arange(tokens)[None], 128, 1e4)
        logits, labels = torch.randn(256, vocab).bfloat16(), torch.randint(vocab, (256,))
    codes, scale, rms = fused.quantize(stream, gains[0], None)
    _, _, inner_rms = fused.quantize(gate_up, gains[1], "relu2")
    stacked, n, wide_n = stack(weights), tokens * hidden, tokens * inner
    grad_gate_up, dtype, no = torch.cat((wide, wide), dim=1), torch.bfloat16, None
    yield Pass("norm, quantise", lambda: fused.quantize(stream, gains[0], None), 5 * n)
    yield Pass("activation, norm, quantise", lambda: fused.quantize(gate_up, gains[1], "relu2"), 5 * wide_n)
    yield Pass("back through norm", lambda: fused.norm_backward(grad, stream, gains[0], rms, None), 10 * n)
    yield Pass(
        "back through activation and norm",
        lambda: fused.norm_backward(wide, gate_up, gains[1], inner_rms, "relu2"),
        10 * wide_n,
    )
    operations = 2 * n * 2 * inner
    yield Pass("gate, up", lambda: fused.linear(codes, scale, stacked, no, no, dtype), operations, "TOP/s")
    yield Pass(
        "back through gate, up",
        lambda: fused.linear_backward(grad_gate_up, codes, scale, stacked, dtype, True),
        2 * operations,
        "TOP/s",
    )
    yield Pass("ternary codes of a weight", lambda: quantize_weight(weights[0]), 9 * weights[0].numel())
    yield Pass("positions", lambda: rotate(heads, by), 4 * n)
    yield Pass("log-likelihood", lambda: loss._log_likelihood(logits, labels), 2 * logits.numel())


def seconds(call: Callable[[], object], in_torch: bool, device: str) -> float:
    """How long a call takes; on CUDA the median of some."""
    with passes_in_torch() if in_torch else nullcontext(), torch.no_grad():
        if device == "cuda":
            return median_milliseconds(call, device, _ROUND) / 1e3
        start = time.perf_counter()
        call()
    return time.perf_counter() - start


def compare(one: Pass, rounds: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of every round, ours and torch's; the first one, which compiles, is left out."""
    times = [(seconds(one.call, False, device), seconds(one.call, True, device)) for _ in range(rounds + 1)][1:]
    ours, torchs = map(list, zip(*times, strict=True))
    return ours, torchs


def main() -> None:
    """Runs the benchmark."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 1024, "hidden": 2560, "inner": 6912, "vocab": 128256, "rounds": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=integer(1), default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(context_line(torch.get_num_threads()))
    print(f"{'':34}{'ms':>9}{'rate':>14}{'in torch, ms':>14}{'ratio':>24}")
    results = {}
    for one in passes(arguments.tokens, arguments.hidden, arguments.inner, arguments.vocab, device):
        ours, torchs = compare(one, arguments.rounds, device)
        typical, giga = statistics.median(ours), 1e12 if one.unit == "TOP/s" else 1e9
        rate, ratio = f"{one.work / typical / giga:.2f} {one.unit}", Spread.of(ratios(torchs, ours)).text()
        print(
            f"{one.name:34}{1e3 * typical:9.2f}{rate:>14}{1e3 * statistics.median(torchs):14.2f}{ratio:>24}", flush=True
        )
        results[one.name] = {"ours": ours, "torch": torchs}
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    run_command(main)
