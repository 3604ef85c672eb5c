"""One training step by its kernels: what takes the time, and where the GPU waits.

    python tools/profile_step.py                                   # 2560x4, documents of 1,000 tokens, 2b4t's head
    python tools/profile_step.py --contestant dense --rows 40

A step of `benchmark_step`, profiled after some that are not. The last lines: milliseconds of steps without the
profiler, the time until the host had launched them, the share of a profiled step in which the GPU worked, and its
longest waits, each with the kernels before and after it.
"""

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from benchmark_step import CONTESTANTS, Rows, Trainer, decoder
from benchmarking import context_line, synchronize
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.options import integer

_STEPS = 5  # that are timed


class Kernel(NamedTuple):
    """A kernel's name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


class Wait(NamedTuple):
    """Microseconds in which no kernel ran, and the kernels around them."""

    length: float
    after: str
    before: str


def waits(kernels: Sequence[Kernel]) -> list[Wait]:
    """The gaps between kernels, which may overlap, the longest first."""
    found = []
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    last = ordered[0]
    for kernel in ordered[1:]:
        if kernel.start > last.end:
            found.append(Wait(kernel.start - last.end, last.name, kernel.name))
        last = max(last, kernel, key=lambda one: one.end)
    return sorted(found, reverse=True)


def main() -> None:
    """Runs the profile."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2560x4", help="hidden size x layers")
    parser.add_argument("--tokens", type=integer(1), default=16384, help="tokens a step")
    parser.add_argument("--seq", type=integer(1), default=4096, help="tokens a row")
    parser.add_argument("--documents", type=integer(0), default=1000, help="tokens a document; 0: one a row")
    parser.add_argument("--vocab", type=integer(1), default=128256)
    parser.add_argument("--rows", type=integer(1), default=30, help="rows of the table")
    parser.add_argument("--contestant", choices=CONTESTANTS, default="bitnet_train")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(context_line(torch.get_num_threads()))
    trainer = Trainer(CONTESTANTS[arguments.contestant], decoder(arguments.shape, arguments.vocab), device)
    rows = Rows.drawn(arguments.tokens // arguments.seq, arguments.seq, arguments.vocab, arguments.documents, device)
    for _ in range(3):
        trainer.step(rows)
    began = time.perf_counter()
    for _ in range(_STEPS):
        trainer.launch(rows)
    launched = time.perf_counter() - began
    synchronize(device)
    took = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as made:
        trainer.step(rows)
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(made.key_averages().table(sort_by=order, row_limit=arguments.rows, max_name_column_width=70))
    rate, times = rows.ids.numel() * _STEPS / took, [1e3 * seconds / _STEPS for seconds in (took, launched)]
    print(f"{arguments.contestant}: {times[0]:.1f} ms a step, launched after {times[1]:.1f} ms; {rate:,.0f} tokens/s")
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in made.events() or []
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    if kernels:
        gaps, whole = waits(kernels), max(k.end for k in kernels) - min(k.start for k in kernels)
        worked = 1 - sum(gap.length for gap in gaps) / whole
        print(f"the GPU worked {worked:.1%} of {whole / 1e3:.1f} ms; its longest waits:")
        for gap in gaps[:15]:
            print(f"{gap.length:9.0f} us  {gap.after[:60]:60}  ->  {gap.before[:60]}")


if __name__ == "__main__":
    run_command(main)
