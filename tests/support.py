"""What several tests need: a tiny tokenizer, tiny data, and the commands as a user runs them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bitnet_train.data.mixture import Items, Span, fit, mixed_items
from bitnet_train.data.store import Counts, TokenStore, sequence
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.model.config import BitNetConfig

ROOT = Path(__file__).parents[1]
WORDS = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog while seven wizards quietly mix bold potions")

TINY = BitNetConfig(
    vocab_size=384,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_theta=10000.0,
)
DENSE = {  # of a transformers model; the vocabulary is its own
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TINY_OVERRIDES = [
    "trainer=cpu",
    "model=tiny",
    "model.vocab_size=384",
    "model.intermediate_size=256",
    "model.max_position_embeddings=128",
    "data.sequence_length=64",
]

TINY_PRETRAIN = [  # in a folder that `write_corpus` has filled
    "+recipe=quickstart-pretrain",
    *TINY_OVERRIDES,
    "model.hidden_size=128",
    "data.train=text.jsonl",
    "data.val=text.jsonl",
    "data.tokenizer=tokenizer",
    "data.cache_dir=cache",
    "global_batch_size=4",
    "micro_batch_size=2",
    "log_every=1",
    "schedule.warmup_steps=2",
]


def sentence(number: int) -> str:
    """A text that depends on its number alone."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(12 + number % 9))


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 384 tokens."""
    return train_bpe((sentence(i) for i in range(50)), 384)


def write_jsonl(file: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """A file with one JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def text_rows(count: int) -> list[dict[str, object]]:
    return [{"text": sentence(i)} for i in range(count)]


def chat_rows(count: int) -> list[dict[str, object]]:
    return [
        {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": sentence(i + 1)}]}
        for i in range(count)
    ]


def preference_rows(count: int) -> list[dict[str, object]]:
    return [{"prompt": sentence(i), "chosen": sentence(i + 1), "rejected": sentence(i + 2)} for i in range(count)]


def write_corpus(folder: Path, rows: int = 60) -> Path:
    """A tokenizer and text.jsonl, in the folder."""
    (folder / "tokenizer").mkdir()
    tiny_tokenizer().save(folder / "tokenizer")
    write_jsonl(folder / "text.jsonl", text_rows(rows))
    return folder


def store_of(ids: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]] | bool = True) -> TokenStore:
    """A store in memory of sequences that come from a row each."""
    flags: Sequence[Sequence[bool] | bool] = [trained] * len(ids) if isinstance(trained, bool) else trained
    tokens = np.concatenate([sequence(i, t) for i, t in zip(ids, flags, strict=True)])
    ends = np.cumsum([len(i) for i in ids])
    return TokenStore(tokens, ends, np.arange(len(ids)), Counts(len(ids), len(tokens)))


def span_of(ids: Sequence[Sequence[int]]) -> Span:
    """All of a store of documents."""
    store = store_of(ids)
    return Span(store, 0, len(store.tokens))


def items_of(store: TokenStore, width: int = 1, capacity: int = 1 << 20) -> Items:
    """All of a store of conversations (width 1) or pairs (width 2)."""
    return mixed_items([store], [fit(store, width, capacity, "drop")], [1.0], width, capacity)


def pairs_of(*pairs: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> Items:
    """Preference pairs of (prompt, chosen, rejected)."""
    completed = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    ids = [[*prompt, *answer] for prompt, answer in completed]
    trained = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in completed]
    return items_of(store_of(ids, trained), width=2)


def environment() -> dict[str, str]:
    """The variables of a command that a test starts: one thread, and this checkout."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def python(*arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in a folder and waits."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)


def train(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m bitnet_train OVERRIDES`."""
    return python("-m", "bitnet_train", *overrides, cwd=cwd)
