"""Time and memory of an export, beside a copy of the file and beside transformers' own packing.

    python tools/benchmark_export.py [--layers N --hidden N ...] [--json OUT]

A random model in bfloat16 is made on the spot, by default with the shapes of BitNet b1.58 2B4T (4.8 GB). Then follow,
each in a process of its own and with the input dropped from the page cache:

    copy              cp of the weights, and fsync
    read and write    the input is read, then as many bytes as the packed file has are written, and fsync
    and read back     the same, and what was written is read: the least that a verified export does
    safetensors       export to packed safetensors; "verified": with reading it back
    i2_s              export to GGUF I2_S; "verified": with reading it back
    pack_weights      transformers: load_file, absmean and rounding in float32, pack_weights, save_file

Every round runs each way once, in this order. Seconds are of the work, without the start of Python: the median and the
quartiles of the rounds. Ratios are those of a round's seconds; CPU seconds, those of all threads, are what other
programs on the machine disturb least. Memory is the largest resident set of the process, mapped pages of files among
it.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from benchmarking import Spread, ratios, resident_bytes, write_results
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.export.cli import run as export_command
from bitnet_train.formats.atomic import fsync
from bitnet_train.formats.hf_folder import CONFIG
from bitnet_train.formats.json_file import write_json
from bitnet_train.formats.safetensors_file import WEIGHTS, LazyTensors, TensorInfo, write_weights
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.skeleton import skeleton, tensor_shapes
from bitnet_train.options import integer

_CHUNK = 1 << 22
_WIDTH = 150


@dataclass(frozen=True)
class Figure:
    """What one way of writing took."""

    name: str
    seconds: float
    cpu_seconds: float
    gigabytes_per_second: float  # of the input and the output
    peak_gigabytes: float


def make_model(folder: Path, config: BitNetConfig) -> None:
    """A folder of random bfloat16 masters with a tokenizer, written one matrix at a time."""
    shapes = tensor_shapes(skeleton(config))

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensors:
        info = TensorInfo(torch.bfloat16, shape)
        return LazyTensors({name: info}, [lambda: {name: torch.empty(shape, dtype=torch.bfloat16).normal_()}])

    folder.mkdir()
    write_json(folder / CONFIG, config.to_json())
    write_weights(folder, starmap(tensor, shapes.items()), max_shard_bytes=1 << 62)
    train_bpe(["a benchmark of export"], 300).save(folder)


def copy(source: Path, target: Path) -> None:
    """cp, and fsync."""
    subprocess.run(["cp", source / WEIGHTS, target], check=True)
    fsync(target)


def read_and_write(source: Path, target: Path) -> None:
    """Reads the input, and writes a quarter of its bytes, about what packing leaves of it."""
    buffer = bytearray(_CHUNK)
    with (source / WEIGHTS).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with target.open("wb", buffering=0) as file:
        for _ in range((source / WEIGHTS).stat().st_size // 4 // _CHUNK):
            file.write(buffer)
        os.fsync(file.fileno())


def read_write_and_read_back(source: Path, target: Path) -> None:
    """The same, and reads what was written."""
    read_and_write(source, target)
    buffer = bytearray(_CHUNK)
    with target.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def pack_weights(source: Path, target: Path) -> None:
    """What a user of transformers writes: the whole file, the formula, its pack_weights, the whole file."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.bitnet import pack_weights as pack

    tensors = load_file(source / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().mean().clamp(min=1e-5)
        tensors[name] = pack((weight / scale).round().clamp(-1, 1))
        tensors[f"{name}_scale"] = scale.bfloat16().reshape(1)
    save_file(tensors, target, metadata={"format": "pt"})
    fsync(target)


def _command(*options: str) -> Callable[[Path, Path], object]:
    """bitnet-export with these options."""
    return lambda source, target: export_command([str(source), str(target), *options])


BASE, VERIFIED_BASE, PEER = "read and write", "and read back", "pack_weights"
WAYS: dict[str, Callable[[Path, Path], object]] = {
    "copy": copy,
    BASE: read_and_write,
    VERIFIED_BASE: read_write_and_read_back,
    "safetensors": _command("--format=safetensors", "--no-verify"),
    "safetensors, verified": _command("--format=safetensors"),
    "i2_s": _command("--format=gguf", "--no-verify"),
    "i2_s, verified": _command("--format=gguf"),
    PEER: pack_weights,
}


def run_way(name: str, source: Path, target: Path) -> Figure:
    """Runs one way here and measures it."""
    if name == PEER:
        importlib.import_module("transformers.integrations.bitnet")  # ours is imported already
    _drop_from_cache(source / WEIGHTS)
    start, cpu = time.perf_counter(), time.process_time()
    WAYS[name](source, target)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    written = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    read = (source / WEIGHTS).stat().st_size
    return Figure(name, seconds, cpu_seconds, (read + written) / seconds / 1e9, resident_bytes() / 1e9)


def _drop_from_cache(path: Path) -> None:
    fsync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_a_process(name: str, source: Path, folder: Path) -> Figure:
    target = folder / "out"
    command = [sys.executable, __file__, "--way", name, str(source), str(target)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return Figure(**json.loads(result.stdout.splitlines()[-1]))


def _table(rounds: Sequence[Mapping[str, Figure]]) -> Table:
    table = Table("way", "seconds", f"of {BASE}", f"of {VERIFIED_BASE}", "CPU seconds", "GB/s", "peak GB")
    seconds = {way: [figures[way].seconds for figures in rounds] for way in WAYS}
    for way in WAYS:
        figures = [figures[way] for figures in rounds]
        table.add_row(
            way,
            Spread.of(seconds[way]).text(),
            *(Spread.of(ratios(seconds[way], seconds[base])).text() for base in (BASE, VERIFIED_BASE)),
            Spread.of([figure.cpu_seconds for figure in figures]).text(),
            Spread.of([figure.gigabytes_per_second for figure in figures]).text(),
            f"{max(figure.peak_gigabytes for figure in figures):.2f}",
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Time and memory of an export.")
    released = BitNetConfig()
    parser.add_argument("--layers", type=integer(1), default=released.num_hidden_layers)
    parser.add_argument("--hidden", type=integer(1), default=released.hidden_size)
    parser.add_argument("--intermediate", type=integer(1), default=released.intermediate_size)
    parser.add_argument("--vocab", type=integer(1), default=released.vocab_size)
    parser.add_argument("--heads", type=integer(1), default=released.num_attention_heads)
    parser.add_argument("--kv-heads", type=integer(1), default=released.num_key_value_heads)
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--repeat", type=integer(1), default=1, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--way", nargs=3, metavar=("NAME", "SRC", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> BitNetConfig:
    return BitNetConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
    )


def _main() -> None:
    arguments = _arguments()
    if arguments.way:
        name, source, target = arguments.way
        print(json.dumps(asdict(run_way(name, Path(source), Path(target)))))
        return
    if arguments.repeat < 1:
        raise UserError(f"--repeat must be at least 1, got {arguments.repeat}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_model(folder / "model", _config(arguments))
        rounds = [{way: _in_a_process(way, folder / "model", folder) for way in WAYS} for _ in range(arguments.repeat)]
    Console(width=_WIDTH).print(_table(rounds))
    if arguments.json:
        write_results(arguments.json, [{way: asdict(figure) for way, figure in round.items()} for round in rounds])


if __name__ == "__main__":
    run_command(_main)
