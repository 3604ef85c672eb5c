"""What the ternary health costs: a measurement against the training steps between two of them.

python tools/benchmark_health.py [--hidden N] [--layers N] [--rows N] [--length N] [--every N] [--rounds N] [--json OUT]

    share = median seconds of a measurement / (every x median seconds of forward and backward)

Measurements and steps take turns, so that both see the same machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch

from benchmarking import synchronize
from bitnet_train.data.batches import TokenBatch
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.options import integer
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training.health import TernaryHealth


def model_of(hidden: int, layers: int, length: int) -> BitNetForCausalLM:
    """A decoder in the quickstart's proportions."""
    return BitNetForCausalLM(
        BitNetConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=11 * hidden // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128,
            max_position_embeddings=length,
        )
    )


def batch_of(rows: int, length: int, device: str) -> TokenBatch:
    """Random ids, a document per row."""
    ids = torch.randint(0, 4096, (rows, length), device=device)
    return TokenBatch(ids, ids, torch.arange(length, device=device).expand(rows, -1), torch.zeros_like(ids))


def seconds(run: Callable[[], object], device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and of a measurement, and the share of the one in the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(arguments.hidden, arguments.layers, arguments.length).to(device)
    batch, health, stage = batch_of(arguments.rows, arguments.length, device), TernaryHealth(1), Pretrain()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            stage.step(model, batch).loss_sum.backward()

    def look() -> None:
        with torch.autocast(device, torch.bfloat16):
            health.measure(model, batch)

    times = [(seconds(step, device), seconds(look, device)) for _ in range(arguments.rounds + 1)][1:]
    of_step, of_health = (statistics.median(column) for column in zip(*times, strict=True))
    return {"step": of_step, "health": of_health, "share": of_health / (arguments.every * of_step)}


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = ArgumentParser(description="Cost of the ternary health.")
    sizes = {"hidden": 512, "layers": 2, "rows": 8, "length": 256, "every": 50, "rounds": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=integer(1), default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(
        f"step {result['step']:.4f} s, measurement {result['health']:.4f} s, every {arguments.every} steps: "
        f"{result['share']:.3%} of the time"
    )
    if arguments.json:
        with atomic_file(arguments.json) as file:
            file.write_text(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
