"""The loss over a large vocabulary, forward and backward: time and peak memory of several ways to compute it.

    python tools/benchmark_loss.py                      # 128,256 ids, hidden 1024, 4,096 tokens

Times: the contestants take turns, ratios are taken within a round against the plain loss (bf16 logits, float32
softmax, as a training loop writes it), and reported as median and quartiles. Memory: the highest resident size above
the one before the loss, each in a process of its own; on CUDA the allocator's peak.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarking import Spread, ratios, resident_bytes, synchronize
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.losses.tokens import cross_entropy_sum, token_logps
from bitnet_train.memory import keep_freed_memory
from bitnet_train.options import integer

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def checkpointed_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain losses of 256 tokens, whose logits autograd makes again."""
    chunks = zip(hidden.split(256), labels.split(256), strict=True)
    losses = [checkpoint(plain, h, weight, y, use_reentrant=False) for h, y in chunks]
    return torch.stack(losses).sum()


def token_log_probabilities(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, one number per token, as DPO needs them."""
    return -token_logps(hidden, weight, labels).sum()


CONTESTANTS: dict[str, Loss] = {
    "plain": plain,
    "cross_entropy_sum": cross_entropy_sum,
    "token_logps": token_log_probabilities,
    "checkpointed chunks": checkpointed_chunks,
}
if hasattr(F, "linear_cross_entropy"):
    CONTESTANTS["torch linear_cross_entropy"] = lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum"
    )


class Problem:
    """States, head and labels, and one evaluation of a loss with its gradients."""

    def __init__(self, vocab: int, hidden: int, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.hidden = torch.randn(tokens, hidden, device=device).requires_grad_()
        self.weight = torch.randn(vocab, hidden, device=device).mul_(0.02).requires_grad_()
        self.labels = torch.randint(vocab, (tokens,), device=device)

    def seconds(self, loss: Loss) -> float:
        """Seconds of forward and backward."""
        self.hidden.grad = self.weight.grad = None
        synchronize(self.device)
        start = time.perf_counter()
        with torch.autocast(self.device, dtype=torch.bfloat16):
            value = loss(self.hidden, self.weight, self.labels)
        value.backward()
        synchronize(self.device)
        return time.perf_counter() - start


def peak_bytes(name: str, vocab: int, hidden: int, tokens: int, device: str) -> int:
    """Peak memory of one evaluation above what the problem itself takes; for a process of its own."""
    problem = Problem(vocab, hidden, tokens, device)
    small = Problem(64, 64, 4, device)
    small.seconds(CONTESTANTS[name])  # libraries are loaded before the measurement
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.seconds(CONTESTANTS[name])
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    problem.seconds(CONTESTANTS[name])
    return resident_bytes() - before


def main() -> None:
    """Runs the benchmark."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=integer(1), default=128256)
    parser.add_argument("--hidden", type=integer(1), default=1024)
    parser.add_argument("--tokens", type=integer(1), default=4096)
    parser.add_argument("--rounds", type=integer(1), default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (arguments.vocab, arguments.hidden, arguments.tokens, device)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_bytes, (name, *shape)) for name in CONTESTANTS}
    keep_freed_memory()
    problem = Problem(*shape)
    rounds = [{name: problem.seconds(loss) for name, loss in CONTESTANTS.items()} for _ in range(arguments.rounds + 1)]
    print(f"vocabulary {shape[0]}, hidden {shape[1]}, {shape[2]} tokens, {device}, {torch.get_num_threads()} threads")
    print(f"{'':28}{'seconds':>9}{'of plain':>10}{'quartiles':>14}{'peak MB':>9}{'of plain':>10}")
    for name, peak in peaks.items():
        own, plainly = ([seconds[which] for seconds in rounds[1:]] for which in (name, "plain"))
        ratio, typical = Spread.of(ratios(own, plainly)), statistics.median(own)
        spread = f"{ratio.low:.2f}..{ratio.high:.2f}"
        print(f"{name:28}{typical:9.2f}{ratio.median:10.2f}{spread:>14}{peak / 1e6:9.0f}{peak / peaks['plain']:10.3f}")


if __name__ == "__main__":
    run_command(main)
