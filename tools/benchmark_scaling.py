"""Training on several processes: tokens/s, bytes that ranks send per step, and what these bytes cost on a cluster.

    python tools/benchmark_scaling.py                          # 1 and 2 processes, one core each
    python tools/benchmark_scaling.py --link-gigabytes 25      # the calculation for another link

alone      one process
ddp        every rank has all; gradients are all-reduced
fsdp       weights, gradients, optimizer sharded; float32 masters are gathered, twice per layer, gradients scattered
low_bit    the same with ternary codes gathered in place of masters (execution.low_bit_gather)

Bytes are counted where collectives enter torch.distributed, in a step of its own, and told as what a rank sends in a
ring of N: (N - 1) / N of what is gathered or scattered, twice that of what is all-reduced (Patarasu and Yuan, 2009).
The formula `bytes_per_step` has to give the counted number; it is then evaluated at the shape of 2B4T for more ranks
than there are here. That table is a calculation: bytes over bandwidth, nothing hidden behind arithmetic, no latency.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_train import config as configuration
from bitnet_train.data.batches import TokenBatch
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.memory import keep_freed_memory
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.skeleton import skeleton
from bitnet_train.options import integer, number
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training.low_bit import gather_codes, refresh_scales
from bitnet_train.training.sharding import shard

WAYS = ("alone", "ddp", "fsdp", "low_bit")
CLUSTERS = (8, 64, 256, 1024)


class Step(nn.Module):
    """The loss of a batch, as the training module computes it."""

    def __init__(self, model: BitNetForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Mean over the labels, shape ()."""
        output = Pretrain().step(self.model, batch)
        return output.loss_sum / output.count


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, by collective."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share = (ranks - 1) / ranks
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes a collective and lets it run."""
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d":
            if "allreduce" in name:
                self._add("all_reduce", 2 * sum(tensor.nbytes for tensor in args[0]))
            elif "allgather" in name:
                self._add("all_gather", args[0].nbytes)
            elif "reduce_scatter" in name:
                self._add("reduce_scatter", args[1].nbytes)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, payload: int) -> None:
        self.sent[name] = self.sent.get(name, 0.0) + self.share * payload


@dataclass(frozen=True)
class Sizes:
    """What decides about the bytes of a model: values of ternary matrices, their rows, values of the other parameters.

    `inside` are those of the decoder layers, gathered with them; `outside` embedding, head and final norm.
    """

    ternary: int
    rows: int
    inside: int
    outside: int

    @classmethod
    def of(cls, config: BitNetConfig) -> "Sizes":
        """Of a decoder."""
        model = skeleton(config)
        matrices = [module.weight for module in model.modules() if isinstance(module, BitLinear)]
        ternary = sum(matrix.numel() for matrix in matrices)
        layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
        every = sum(parameter.numel() for parameter in model.parameters())
        return cls(ternary, sum(len(matrix) for matrix in matrices), layers - ternary, every - layers)


def bytes_per_step(way: str, sizes: Sizes, ranks: int) -> float:
    """What a rank sends in one step of one micro-batch, padding of uneven shards left out; P all values.

    ddp        (N - 1) / N * 2 * 4 P
    fsdp       (N - 1) / N * (2 * 4 layers + 4 outside + 4 P)
    low_bit    (N - 1) / N * (2 (ternary / 4 + 4 inside) + 4 outside + 4 P + 2 * 8 rows)
    """
    every = sizes.ternary + sizes.inside + sizes.outside
    gathered = {
        "alone": 0.0,
        "ddp": 4.0 * every,
        "fsdp": 2 * 4 * (sizes.ternary + sizes.inside) + 4 * sizes.outside,
        "low_bit": 2 * (sizes.ternary / 4 + 4 * sizes.inside) + 4 * sizes.outside + 2 * 8 * sizes.rows,
    }
    return (ranks - 1) / ranks * (gathered[way] + 4 * every)


@dataclass(frozen=True)
class Plan:
    """What every process of a measurement does."""

    config: BitNetConfig
    rows: int
    length: int
    steps: int


def distributed(way: str, step: Step, ranks: int) -> nn.Module:
    """The module that is trained."""
    if way == "ddp":
        return DistributedDataParallel(step, gradient_as_bucket_view=True)
    if way in ("fsdp", "low_bit"):
        shard(step, step.model, init_device_mesh("cpu", (ranks,)), ())
    if way == "low_bit":
        gather_codes(step.model.model.layers)
        refresh_scales(step.model)
    return step


def trainer(way: str, plan: Plan, rank: int, ranks: int) -> Callable[[], None]:
    """A function that does one optimizer step on this rank's rows."""
    torch.manual_seed(0)
    step = Step(BitNetForCausalLM(plan.config))
    module = distributed(way, step, ranks)
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(rank)
    ids = torch.randint(0, plan.config.vocab_size, (plan.rows, plan.length + 1))
    positions = torch.arange(plan.length).expand(plan.rows, -1)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], positions, torch.zeros_like(positions))

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "low_bit":
            refresh_scales(step.model)

    return train


def work(way: str, plan: Plan, rank: int, ranks: int, port: int, results: "SimpleQueue[Any]") -> None:
    """One process: the median time of a step and the bytes that it sends, by collective."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    keep_freed_memory()
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    train = trainer(way, plan, rank, ranks)
    train()
    with SentBytes(ranks) if ranks > 1 else nullcontext(SentBytes(1)) as counted:
        train()
    times = []
    for _ in range(plan.steps):
        start = time.perf_counter()
        train()
        times.append(time.perf_counter() - start)
    if ranks > 1:
        dist.barrier()
    results.put((rank, statistics.median(times), counted.sent))
    os._exit(0)  # gloo's threads abort now and then at the interpreter's own end


def measure(way: str, plan: Plan) -> dict[str, Any]:
    """Tokens/s of all processes together, and the bytes that one of them sends per step."""
    ranks = 1 if way == "alone" else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[Any] = context.SimpleQueue()
    processes = [context.Process(target=work, args=(way, plan, rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    measured = sorted(results.get() for _ in processes)
    seconds = max(time_of_step for _, time_of_step, _ in measured)
    return {
        "processes": ranks,
        "tokens_per_second": ranks * plan.rows * plan.length / seconds,
        "bytes_per_step": sum(measured[0][2].values()),
        "by_collective": measured[0][2],
        "bytes_by_formula": bytes_per_step(way, Sizes.of(plan.config), ranks),
    }


def model_of(name: str) -> BitNetConfig:
    """A model of conf/model."""
    from omegaconf import DictConfig, OmegaConf

    node = OmegaConf.load(configuration.CONF_DIR / f"model/{name}.yaml")
    assert isinstance(node, DictConfig)
    config = configuration.build(node, "model")
    assert isinstance(config, BitNetConfig)
    return config


def calculated(name: str, gigabytes: float) -> list[dict[str, Any]]:
    """Bytes and seconds of communication per step and rank, at a link's bandwidth in GB/s each way."""
    sizes = Sizes.of(model_of(name))
    return [
        {"model": name, "ranks": ranks, "way": way, "bytes": sent, "seconds": sent / (gigabytes * 1e9)}
        for ranks in CLUSTERS
        for way in WAYS[1:]
        for sent in [bytes_per_step(way, sizes, ranks)]
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description="Tokens/s and bytes of DDP, FSDP2 and FSDP2 with codes on the wire.")
    parser.add_argument("--hidden", type=integer(1), default=1024)
    parser.add_argument("--layers", type=integer(1), default=2)
    parser.add_argument("--vocab", type=integer(1), default=8192)
    parser.add_argument("--rows", type=integer(1), default=2, help="per process and step")
    parser.add_argument("--length", type=integer(1), default=256)
    parser.add_argument("--steps", type=integer(1), default=8)
    parser.add_argument("--model", default="2b4t", help="of conf/model, for the calculation")
    parser.add_argument(
        "--link-gigabytes", type=number(1e-3), default=50.0, help="GB/s of each rank (400 Gb/s by default)"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Prints both tables."""
    options = arguments()
    config = BitNetConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256,
        max_position_embeddings=options.length,
        rope_theta=10000.0,
    )
    plan = Plan(config, options.rows, options.length, options.steps)
    measured = {}
    for way in WAYS:
        measured[way] = row = measure(way, plan)
        print(
            f"{way:8}  {row['processes']} processes  {row['tokens_per_second']:8.0f} tokens/s  sent per rank and step "
            f"{row['bytes_per_step'] / 1e6:8.1f} MB  by the formula {row['bytes_by_formula'] / 1e6:8.1f} MB",
            flush=True,
        )
    table = calculated(options.model, options.link_gigabytes)
    print(f"\ncalculated: {options.model}, one micro-batch per step, {options.link_gigabytes:g} GB/s per rank")
    for row in table:
        print(f"{row['ranks']:5} ranks  {row['way']:8}  {row['bytes'] / 1e9:7.2f} GB  {row['seconds']:7.3f} s")
    if options.json:
        options.json.write_text(json.dumps({"measured": measured, "calculated": table}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
