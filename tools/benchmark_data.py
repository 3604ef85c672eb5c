"""How fast text becomes token ids on disk, and how fast rows are read from there, against other ways to do it.

    encode_batch        tokenizers' own rate: texts in memory, ids thrown away
    cache               ours: from the .jsonl to a sealed token cache, every core
    cache, one .txt     likewise, all of the text as one document in a text file
    cache, one row      likewise, in one line of a .jsonl
    datasets.map        load_dataset("json").map(encode_batch) to its own arrow cache, a process per core
    trl                 SFTTrainer's preparation of the same data set, a process per core (where trl is installed)
    read                rows of the cache through the DataModule's loader, collated, in one process
    stream              an epoch of the same rows without a cache (data.streaming=true), after the count of tokens

python tools/benchmark_data.py [--megabytes 50] [--tokenizer DIR] [--json OUT]

The text is the standard library's modules and help pages, repeated until it is large enough. Every way runs in a
process of its own with an empty cache; memory is the peak over that process and its children. Shares are of
encode_batch's rate. The rate per core counts the time that cores were at work: other programs disturb it less.
"""

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_train.data.cache import tokenized
from bitnet_train.data.config import TextData
from bitnet_train.data.encoding import TextEncoder
from bitnet_train.data.module import DataModule
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.data.workers import available_cores
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.options import number

Result = dict[str, float]
_BATCH = 1000  # texts per call, the default of datasets.map
_READ_SECONDS, _SAMPLE_SECONDS, _SEQUENCE_LENGTH = 5.0, 0.2, 2048


def documents() -> list[str]:
    """Modules and help pages of the standard library."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
    sources = (file.read_text(encoding="utf-8", errors="ignore") for file in modules if "-packages" not in str(file))
    return [text for text in chain(pydoc_data.topics.topics.values(), sources) if text]


def write_corpus(file: Path, megabytes: float) -> None:
    """Rows {"text"} of so many MB of text in all; a repeated document begins with its number."""
    size = 0
    with file.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(cycle(documents())):
            row = f"{number}\n{text}"
            stream.write(json.dumps({"text": row}) + "\n")
            size += len(row.encode())
            if size >= megabytes * 1e6:
                return


def join_corpus(folder: Path) -> None:
    """The texts of corpus.jsonl as one document: in text.txt, and in the one line of row.jsonl."""
    with (folder / "text.txt").open("w", encoding="utf-8") as text, (folder / "row.jsonl").open("w") as row:
        row.write('{"text": "')
        for batch in texts(folder / "corpus.jsonl"):
            document = "".join(f"{part}\n" for part in batch)
            text.write(document)
            row.write(json.dumps(document)[1:-1])
        row.write('"}\n')


def texts(file: Path) -> Iterator[list[str]]:
    """The corpus in batches."""
    batch = []
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


class Stopwatch:
    """Sums the seconds spent within its blocks: of the clock, and of the cores (waited-for children included)."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._start = os.times()

    def __exit__(self, *_: object) -> None:
        end = os.times()
        self.seconds += end.elapsed - self._start.elapsed
        self.cpu_seconds += sum(end[:4]) - sum(self._start[:4])


def encode_batch(folder: Path, watch: Stopwatch) -> int:
    """The time within encode_batch alone."""
    backend = Tokenizer.from_folder(folder / "tokenizer")._backend
    tokens = 0
    for batch in texts(folder / "corpus.jsonl"):
        with watch:
            encodings = backend.encode_batch(batch, add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return tokens


def cache(folder: Path, watch: Stopwatch, corpus: str = "corpus.jsonl") -> int:
    """Everything from the file to the sealed cache."""
    encoder = TextEncoder(Tokenizer.from_folder(folder / "tokenizer"))
    with watch:
        store = tokenized([str(folder / corpus)], encoder, folder / "cache")
    return store.counts.tokens


def datasets_map(folder: Path, watch: Stopwatch) -> int:
    """Everything from the file to the arrow cache of `map`."""
    backend = Tokenizer.from_folder(folder / "tokenizer")._backend

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [e.ids for e in backend.encode_batch(batch["text"], add_special_tokens=False)]}

    with watch:
        mapped = _json_rows(folder).map(encode, batched=True, remove_columns="text", num_proc=available_cores())
    return _tokens(mapped)


def trl(folder: Path, watch: Stopwatch) -> int:
    """Everything from the file to the tokenized data set that SFTTrainer trains on, before packing."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = SFTConfig(output_dir=str(folder), dataset_num_proc=available_cores(), bf16=False, max_length=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    with watch:
        mapped = SFTTrainer._prepare_dataset(trainer, _json_rows(folder), tokenizer, config, False, None, "train")
    return _tokens(mapped)


def _json_rows(folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    file = str(folder / "corpus.jsonl")
    return datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "hf"))


def _tokens(mapped: Any) -> int:
    return sum(len(ids) for batch in mapped.iter(_BATCH) for ids in batch["input_ids"])


def read(folder: Path, watch: Stopwatch) -> int:
    """Batches of 8 rows in the shuffled order, for some seconds, from the cache that `cache` built."""
    batches, tokens = iter(_data(folder, streaming=False).train_dataloader()), 0
    while watch.seconds < _READ_SECONDS:
        with watch:
            tokens += next(batches).input_ids.numel()
    return tokens


def stream(folder: Path, watch: Stopwatch) -> int:
    """Likewise an epoch, every block read and tokenized when the order comes to it."""
    data = _data(folder, streaming=True)
    data.steps = int(data.steps_per_epoch())
    with watch:
        return sum(batch.input_ids.numel() for batch in data.train_dataloader())


def _data(folder: Path, streaming: bool) -> DataModule:
    files = {"train": str(folder / "corpus.jsonl"), "cache_dir": str(folder / "cache")}
    config = TextData(_SEQUENCE_LENGTH, streaming=streaming, **files)  # type: ignore[arg-type]
    data = DataModule(config, Tokenizer.from_folder(folder / "tokenizer"), 0, 8, 8)
    data.steps = sys.maxsize
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)  # type: ignore[assignment]
    return data


WAYS: dict[str, Callable[[Path, Stopwatch], int]] = {
    "encode_batch": encode_batch,
    "cache": cache,
    "cache, one .txt": partial(cache, corpus="text.txt"),
    "cache, one row": partial(cache, corpus="row.jsonl"),
    "datasets.map": datasets_map,
    "trl": trl,
    "read": read,
    "stream": stream,
}


def measured(way: str, folder: Path) -> Result | None:
    """The way in a process of its own, with its peak of memory; None where its library is missing."""
    command = [sys.executable, __file__, "--run", way, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(_SAMPLE_SECONDS)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    return None if process.returncode else json.loads(lines[-1]) | {"memory_mb": peak}


def tree_memory(pid: int) -> float:
    """Memory in MB of a process and its children; pages that they share are counted once (Linux, Pss)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3
    return own + sum(tree_memory(int(child)) for child in children)


def run_way(way: str, folder: Path) -> None:
    """Prints what a way measured."""
    watch = Stopwatch()
    tokens = WAYS[way](folder, watch)
    print(json.dumps({"tokens": tokens, "seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}))


def table(results: dict[str, Result | None]) -> Table:
    """Rates per second and per second of a core."""
    shown = Table("way", "M tokens/s", "share", "M tokens/s/core", "share", "memory, MB")
    base = results.get("encode_batch")
    for way, result in results.items():
        if result is None:
            shown.add_row(way, "not installed")
            continue
        cells = []
        for clock in ("seconds", "cpu_seconds"):
            rate = result["tokens"] / result[clock]
            share = f"{rate / base['tokens'] * base[clock]:.0%}" if base and way != "read" else ""
            cells += [f"{rate / 1e6:.2f}", share]
        shown.add_row(way, *cells, f"{result['memory_mb']:,.0f}")
    return shown


def main() -> None:
    """Reads the command line, measures every way, prints the table."""
    parser = ArgumentParser(description="Benchmark tokenization, the token cache and reading it.")
    parser.add_argument(
        "--megabytes", type=number(1e-3, 1e6), default=50, help="size of the text (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: a BPE of 8,192 tokens)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results as JSON")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_way(arguments.run[0], Path(arguments.run[1]))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", arguments.megabytes)
        join_corpus(folder)
        given = Tokenizer.from_folder(arguments.tokenizer) if arguments.tokenizer else train_bpe(documents(), 8192)
        given.save(folder / "tokenizer")
        results = {way: measured(way, folder) for way in arguments.ways}
    Console().print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
