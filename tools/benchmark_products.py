"""Every matrix product of a decoder's layer, attention and the loss by themselves, against what the device can do.

    python tools/benchmark_products.py                                        # 2b4t's layer, 16,384 tokens: for a GPU
    python tools/benchmark_products.py --hidden 128 --tokens 256 --vocab 512  # small

The first lines are the ceilings: a copy (bytes read and written), a large bfloat16 and a large int8 product. Below,
each product has its rate and its share of the bfloat16 ceiling. On CUDA the forward product is made in every way there
is (`kernels/gpu_product`), and each must give the same result to the last bit, or its line says that it is wrong.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark_step import HEADS
from benchmarking import context_line, median_milliseconds, write_results
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.fused import Stacked, linear, linear_backward
from bitnet_train.kernels import gpu_product
from bitnet_train.kernels.integer_matmul import integer_matmul
from bitnet_train.losses import tokens as loss
from bitnet_train.model.attention import Documents
from bitnet_train.model.varlen_attention import available, varlen_attention
from bitnet_train.options import integer

BFLOAT16 = "bfloat16, large"


class Call(NamedTuple):
    """Something to be timed, and its work: operations of products, or bytes."""

    name: str
    call: Callable[[], object]
    work: float
    unit: str = "TFLOP/s"


def ceilings(size: int, device: str) -> Iterator[Call]:
    """The most that the device can do; `size` is that of the square matrices."""
    from_, to = (torch.empty(size * size * 16, dtype=torch.uint8, device=device).random_() for _ in range(2))
    yield Call("copy", lambda: to.copy_(from_), 2 * from_.numel(), "GB/s")
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    yield Call(BFLOAT16, lambda: a @ b, 2 * size**3)
    i, j = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    yield Call("int8, large", lambda: integer_matmul(i, j), 2 * size**3)


def layer_products(tokens: int, hidden: int, device: str) -> Iterator[Call]:
    """The products of a layer, forward and backward: in bfloat16, and in int8 in every way."""
    heads, kv_heads, inner = HEADS[hidden]
    stacked_kv = hidden + 2 * (hidden // heads) * kv_heads
    shapes = {
        "q k v": (hidden, stacked_kv),
        "o": (hidden, hidden),
        "gate up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }
    for name, (size, out) in shapes.items():
        operations = 2 * tokens * size * out
        with torch.device(device):
            x, w = torch.randn(tokens, size).bfloat16(), torch.randn(out, size).bfloat16()
            grad, codes = (
                torch.randn(tokens, out).bfloat16(),
                torch.randint(-127, 128, (tokens, size), dtype=torch.int8),
            )
            stacked = Stacked(torch.randint(-1, 2, (out, size), dtype=torch.int8), torch.rand(out) + 0.5)
            scale = torch.rand(tokens, 1) * 100 + 1
            residual = torch.randn(tokens, out) if name in ("o", "down") else None
        yield Call(f"{name}: bfloat16", functools.partial(torch.matmul, x, w.t()), operations)
        yield Call(f"{name}: bfloat16, backward", lambda g=grad, x=x, w=w: (g @ w, g.t() @ x), 2 * operations)  # type: ignore[misc]
        backward = functools.partial(linear_backward, grad, codes, scale, stacked, torch.bfloat16, True)
        yield Call(f"{name}: ours, backward", backward, 2 * operations)
        yield Call(f"{name}: int8, sums alone", functools.partial(integer_matmul, codes, stacked.codes), operations)
        dtype = torch.bfloat16 if residual is None else torch.float32
        yield Call(
            f"{name}: int8, ours", functools.partial(linear, codes, scale, stacked, None, residual, dtype), operations
        )
        if device == "cuda":
            yield from ways(name, gpu_product.Product(codes, *stacked, scale, None, residual, dtype), operations)


def ways(name: str, product: gpu_product.Product, operations: int) -> Iterator[Call]:
    """The int8 product in each of its ways."""
    expected = None
    for way, call in gpu_product.ways(product).items():
        try:
            y = call(product)
        except Exception as error:
            print(f"{name}: int8, {way}: cannot: {error}")
            continue
        expected = y if expected is None else expected
        right = "" if torch.equal(y, expected) else ": WRONG"
        yield Call(f"{name}: int8, {way}{right}", functools.partial(call, product), operations)


def attentions(tokens: int, seq: int, hidden: int, device: str) -> Iterator[Call]:
    """Attention forward and backward: torch's over whole rows, and within documents."""
    heads, kv_heads, _ = HEADS[hidden]
    with torch.device(device):
        q, k, v, grad = (
            torch.randn(tokens // seq, seq, count, hidden // heads).bfloat16().transpose(1, 2).requires_grad_()
            for count in (heads, kv_heads, kv_heads, heads)
        )
    operations = 3.5 * 2 * tokens * seq * hidden

    def both(attend: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(attend(), (q, k, v), grad)

    def whole(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device == "cuda" else (SDPBackend.MATH,):
        yield Call(f"attention, {backend.name}", lambda b=backend: both(lambda: whole(b)), operations)  # type: ignore[misc]
    for length in (seq, seq // 8):
        documents = Documents(torch.arange(tokens, device=device).view(-1, seq) // length)
        if available(q.device):
            call = functools.partial(varlen_attention, q, k, v, *documents.measure())
            yield Call(f"attention, documents of {length}", lambda c=call: both(c), operations * length / seq)  # type: ignore[misc]


def losses(tokens: int, hidden: int, vocab: int, device: str) -> Iterator[Call]:
    """The loss, forward and backward, with the logits of more and fewer positions at a time."""
    with torch.device(device):
        states, head = (
            torch.randn(tokens, hidden).requires_grad_(),
            (0.02 * torch.randn(vocab, hidden)).requires_grad_(),
        )
        labels = torch.randint(vocab, (tokens,))

    def both() -> object:
        with torch.autocast(device, dtype=torch.bfloat16):
            return torch.autograd.grad(loss.cross_entropy_sum(states, head, labels), (states, head))

    chosen = loss.LOGITS_PER_CHUNK[device]
    for logits in (chosen // 4, chosen, 4 * chosen):
        loss.LOGITS_PER_CHUNK[device] = logits
        yield Call(f"loss, {logits >> 20} Mi logits", both, 6 * tokens * hidden * vocab)
    loss.LOGITS_PER_CHUNK[device] = chosen


def report(calls: Iterator[Call], device: str, ceiling: float | None = None) -> dict[str, float]:
    """Times the calls one after the other and prints a line each; `ceiling` is what shares are of. Milliseconds."""
    times = {}
    for name, call, work, unit in calls:
        try:
            times[name] = median_milliseconds(call, device)
        except Exception as error:
            print(f"{name:44} cannot: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        rate = work / times[name] / (1e6 if unit == "GB/s" else 1e9)
        share = f"{rate / ceiling:8.0%}" if ceiling else ""
        print(f"{name:44}{times[name]:10.3f} ms {rate:8.4g} {unit}{share}", flush=True)
    return times


def main() -> None:
    """Runs the benchmark."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, choices=HEADS, default=2560)
    parser.add_argument("--tokens", type=integer(1), default=16384)
    parser.add_argument("--seq", type=integer(8), default=4096, help="tokens a row of attention")
    parser.add_argument("--vocab", type=integer(1), default=128256)
    parser.add_argument("--large", type=integer(1), default=8192, help="size of the square matrices of the ceilings")
    parser.add_argument("--json", type=Path, help="also write the milliseconds to this file")
    arguments = parser.parse_args()
    if arguments.tokens % arguments.seq:
        raise UserError(f"--tokens must be a multiple of --seq, got {arguments.tokens} and {arguments.seq}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(context_line(torch.get_num_threads()))
    tokens, hidden = arguments.tokens, arguments.hidden
    times = report(ceilings(arguments.large, device), device)
    ceiling = 2 * arguments.large**3 / times[BFLOAT16] / 1e9
    for calls in (
        layer_products(tokens, hidden, device),
        attentions(tokens, arguments.seq, hidden, device),
        losses(tokens, hidden, arguments.vocab, device),
    ):
        times |= report(calls, device, ceiling)
    if arguments.json:
        write_results(arguments.json, times)


if __name__ == "__main__":
    run_command(main)
