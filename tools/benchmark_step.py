"""Whole training steps (forward, backward, AdamW) of one decoder, its linear layers exchanged: tokens/s and memory.

    python tools/benchmark_step.py                       # both default shapes, every contestant that can run here
    python tools/benchmark_step.py --shapes 2560x2 --rounds 9 --contestants dense bitnet_train

The contestants take turns, one step each per round, so that a noisy machine is noisy for all. A ratio is taken within a
round against the dense twin (bf16 autocast, plain Linear) and reported as median and quartiles over the rounds.

    matrix share  s = time of the dense twin's matrix products, by themselves, / time of its step
    limit         1 / (1 - s / 6): int8 halves the forward product, one of three; two stay in bfloat16
    activation    bytes kept for the backward pass per token: the slope between one and two rows of tokens
    step          on a GPU: memory of activations and gradients at the step's peak, without weights and moments
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarking import Spread, context_line, ratios, synchronize, unavailable, write_results
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.kernels import gpu, native
from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.memory import keep_freed_memory
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetDecoderLayer, BitNetForCausalLM
from bitnet_train.options import integer
from bitnet_train.quant import bit_linear

HEADS = {
    128: (4, 2, 256),
    1024: (16, 4, 2816),
    2560: (20, 5, 6912),
}  # hidden size: heads, heads of keys and values, intermediate size


class FakeQuantLinear(nn.Linear):
    """The float path: the same function by dequantised weights and activations."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return bit_linear(input, [self.weight], [self.bias])[0]


@contextmanager
def passes_in_torch() -> Iterator[None]:
    """The passes between the products in torch, not in C++ or Triton."""
    with patch.object(native, "available", _never), patch.object(gpu, "available", _never):
        yield


def _never(*tensors: object, **options: object) -> bool:
    return False


def replace_linears(model: BitNetForCausalLM, make: Callable[[nn.Linear], nn.Module]) -> BitNetForCausalLM:
    """Puts `make(linear)` in the place of every linear layer of the decoder's blocks."""
    for layer in model.model.layers:
        assert isinstance(layer, BitNetDecoderLayer)
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
    return model


def auto_bit_linear(layer: nn.Linear) -> nn.Module:
    """transformers' online quantisation."""
    from transformers.integrations.bitnet import AutoBitLinear

    made = AutoBitLinear(layer.in_features, layer.out_features, bias=False, online_quant=True)
    made.weight = layer.weight
    module: nn.Module = made
    return module


def torchao_bitnet(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """torchao's prototype of BitNet training."""
    from torchao import quantize_
    from torchao.prototype.quantized_training import bitnet_training

    quantize_(model.model.layers, bitnet_training())
    return model


def onebit_linears(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """onebitllms' Triton kernels."""
    from onebitllms import replace_linear_with_bitnet_linear

    model.model.layers = replace_linear_with_bitnet_linear(model.model.layers)
    return model


def compiled(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """torch.compile of every block."""
    for layer in model.model.layers:
        layer.compile()
    return model


@dataclass(frozen=True)
class Contestant:
    """One way to make the linear layers of the decoder."""

    build: Callable[[BitNetConfig], BitNetForCausalLM]
    needs: str | None = None
    cuda_only: bool = False
    native: bool = True


def dense(config: BitNetConfig) -> BitNetForCausalLM:
    """The dense twin."""
    return BitNetForCausalLM(replace(config, quantize=False))


def fake_quant(config: BitNetConfig) -> BitNetForCausalLM:
    """The dense twin's graph with fake quantisation in every linear layer."""

    def make(layer: nn.Linear) -> nn.Module:
        made = FakeQuantLinear(layer.in_features, layer.out_features, bias=False)
        made.weight = layer.weight
        return made

    return replace_linears(dense(config), make)


CONTESTANTS = {
    "dense": Contestant(dense),
    "dense compiled": Contestant(lambda config: compiled(dense(config))),
    "bitnet_train": Contestant(BitNetForCausalLM),
    "bitnet_train, passes in torch": Contestant(BitNetForCausalLM, native=False),
    "bitnet_train compiled": Contestant(lambda config: compiled(BitNetForCausalLM(config))),
    "fake quantisation": Contestant(fake_quant),
    "transformers AutoBitLinear": Contestant(
        lambda config: replace_linears(dense(config), auto_bit_linear), "transformers"
    ),
    "torchao": Contestant(lambda config: torchao_bitnet(dense(config)), needs="torchao"),
    "onebitllms": Contestant(lambda config: onebit_linears(dense(config)), needs="onebitllms", cuda_only=True),
}


class Rows(NamedTuple):
    """Rows of tokens, int64 `(rows, seq)`, and the document of each where a row holds several."""

    ids: Tensor
    documents: Tensor | None

    @classmethod
    def drawn(cls, count: int, seq: int, vocab: int, length: int, device: str) -> "Rows":
        """Random tokens, in documents of `length` tokens on average; 0 makes a row one document."""
        ids = torch.randint(vocab, (count, seq), device=device)
        begins = torch.rand(count, seq, device=device) < 1 / max(1, length)
        return cls(ids, begins.cumsum(dim=1) if length else None)

    def part(self, count: int) -> "Rows":
        """The first row, `count` times."""
        return Rows(
            self.ids[:1].repeat(count, 1), None if self.documents is None else self.documents[:1].repeat(count, 1)
        )


class Trainer:
    """One contestant's model and optimizer, and its step.

    Attributes:
        most: bytes of the GPU that the last step took beside weights and moments.
    """

    def __init__(self, contestant: Contestant, config: BitNetConfig, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.native, self.most = device, contestant.native, 0
        with torch.device(device):
            self.model = contestant.build(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def loss(self, rows: Rows) -> Tensor:
        """The mean loss of rows of tokens."""
        with torch.autocast(self.device, dtype=torch.bfloat16):
            hidden = self.model.model(rows.ids, document_ids=rows.documents)
            return cross_entropy_sum(hidden, self.model.head_weight, rows.ids) / rows.ids.numel()

    def step(self, rows: Rows) -> float:
        """Seconds of one training step."""
        synchronize(self.device)
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        start = time.perf_counter()
        self.launch(rows)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        if self.device == "cuda":
            self.most = torch.cuda.max_memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
        return seconds

    def launch(self, rows: Rows) -> None:
        """One training step, which a GPU may still be at afterwards."""
        with nullcontext() if self.native else passes_in_torch():
            self.loss(rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self, rows: Rows) -> int:
        """Bytes of everything that the graph of one loss keeps, parameters left out."""
        own = {storage.data_ptr() for parameter in self.model.parameters() for storage in storages(parameter)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept.update({s.data_ptr(): s.nbytes() for s in storages(tensor) if s.data_ptr() not in own})
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with nullcontext() if self.native else passes_in_torch(), hooks:
            loss = self.loss(rows)  # keeps the graph alive, so that no address is used twice
        del loss
        return sum(kept.values())


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Where a tensor lies; a wrapper, as torchao makes them of weights, lies where its parts do."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    return [storage for name in tensor.__tensor_flatten__()[0] for storage in storages(getattr(tensor, name))]


def matrix_seconds(config: BitNetConfig, tokens: int, device: str, rounds: int) -> float:
    """Seconds of the dense twin's products of linear layers: forward, for the input, for the weight."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]

    def products() -> None:
        for x, weight, grad in operands:
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    operands = [
        tuple(torch.randn(shape, device=device).bfloat16() for shape in ((tokens, k), (n, k), (tokens, n)))
        for k, n in shapes
    ]
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        products()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return config.num_hidden_layers * statistics.median(times[1:])


@dataclass(frozen=True)
class Figures:
    """One contestant at one shape: seconds of every round, bytes kept per token, and `Trainer.most`."""

    seconds: list[float]
    kept: float
    most: int


def runnable(device: str) -> list[str]:
    """The contestants that can run here; says of the others why not."""
    reasons = {name: unavailable(one.needs, one.cuda_only, device) for name, one in CONTESTANTS.items()}
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: not available: {reason}", file=sys.stderr)
    return [name for name, reason in reasons.items() if not reason]


def decoder(shape: str, vocab: int) -> BitNetConfig:
    """A decoder of `hidden size x layers`.

    Raises:
        UserError: the heads of such a hidden size are not in HEADS.
    """
    hidden, _, layers = shape.partition("x")
    if not (hidden.isdecimal() and layers.isdecimal() and int(hidden) in HEADS and int(layers)):
        raise UserError(f"a shape is hidden size x layers, with one of {', '.join(map(str, HEADS))}, got {shape!r}")
    heads, kv_heads, inner = HEADS[int(hidden)]
    return BitNetConfig(vocab, int(hidden), inner, int(layers), heads, kv_heads, tie_word_embeddings=True)


def benchmark(shape: str, arguments: argparse.Namespace, device: str) -> dict[str, Figures]:
    """Measures one shape and prints its table."""
    config = decoder(shape, arguments.vocab)
    count = arguments.tokens // arguments.seq
    rows = Rows.drawn(count, arguments.seq, arguments.vocab, arguments.documents, device)
    trainers = {name: Trainer(CONTESTANTS[name], config, device) for name in arguments.contestants}
    for name, trainer in trainers.items():
        seconds = [trainer.step(rows) for _ in range(2)]
        print(f"{shape} {name}: first steps {seconds[0]:.1f} s, {seconds[1]:.1f} s", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(arguments.rounds):
        for name, trainer in trainers.items():
            times[name].append(trainer.step(rows))
    figures = {name: Figures(times[name], per_token_bytes(t, rows), t.most) for name, t in trainers.items()}
    print_table(shape, rows.ids.numel(), figures)
    products = matrix_seconds(config, rows.ids.numel(), device, arguments.rounds)
    share = products / statistics.median(times["dense"])
    print(f"matrix share of the dense step {share:.2f}, limit {1 / (1 - share / 6):.2f}\n", flush=True)
    return figures


def per_token_bytes(trainer: Trainer, rows: Rows) -> float:
    """Bytes kept per token, without what does not grow with the number of rows."""
    return (trainer.kept_bytes(rows.part(2)) - trainer.kept_bytes(rows.part(1))) / rows.ids.shape[1]


def print_table(shape: str, tokens: int, figures: dict[str, Figures]) -> None:
    """One line per contestant."""
    dense = figures["dense"]
    print(f"{shape}, {tokens} tokens a step")
    print(f"{'':28}{'tokens/s':>10}{'ratio':>8}{'quartiles':>14}{'kB/token':>10}{'ratio':>8}{'step, GB':>10}")
    for name, own in figures.items():
        ratio = Spread.of(ratios(dense.seconds, own.seconds))
        rate, quartiles = tokens / statistics.median(own.seconds), f"{ratio.low:.2f}..{ratio.high:.2f}"
        memory = f"{own.kept / 1e3:10.1f}{own.kept / dense.kept:8.2f}" + (f"{own.most / 1e9:10.1f}" if own.most else "")
        print(f"{name:28}{rate:10.0f}{ratio.median:8.2f}{quartiles:>14}{memory}")


def main() -> None:
    """Runs the benchmark."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x4", "2560x2"], help="hidden size x layers")
    parser.add_argument("--tokens", type=integer(1), default=2048, help="tokens a step")
    parser.add_argument("--seq", type=integer(1), default=512, help="tokens a row")
    parser.add_argument("--documents", type=integer(0), default=0, help="tokens a document; 0: a row is one document")
    parser.add_argument("--vocab", type=integer(1), default=4096, help="vocabulary of the (dense) embedding and head")
    parser.add_argument("--rounds", type=integer(1), default=7)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: all that can run here")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.contestants = arguments.contestants or runnable(device)
    if "dense" not in arguments.contestants:
        raise UserError("--contestants must hold dense, the one that the others are compared with")
    keep_freed_memory()
    print(context_line(torch.get_num_threads()))
    results = {shape: benchmark(shape, arguments, device) for shape in arguments.shapes}
    if arguments.json:
        write_results(arguments.json, {shape: {n: asdict(f) for n, f in of.items()} for shape, of in results.items()})


if __name__ == "__main__":
    run_command(main)
