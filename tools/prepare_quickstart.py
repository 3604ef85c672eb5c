"""The quickstart's data: real text that every machine with Python and ruff has, in seconds and without a download.

    python tools/prepare_quickstart.py [--out runs/quickstart/data] [--vocab-size 4096]

    pretrain/english.jsonl      the topics of Python's help(), a document each
    pretrain/docstrings.jsonl   the standard library's docstrings, a document per module
    pretrain/code.jsonl         the standard library's modules
    pretrain/heldout.jsonl      topics that share no eight words in a row with any line of the three files above
    sft/{train,heldout}.jsonl   rules of ruff: asked what one checks, or why its subject is bad, the page answers
    dpo/{train,heldout}.jsonl   asked what a rule checks: "What it does" is chosen over "Why is this bad?"
    tokenizer/                  byte-level BPE, trained on the training text above
    summary.json                counts, bytes, and what xz -9 needs for the held-out text

Held out are whole families: texts that share eight words in a row stand on the same side. The same rules are held out for SFT
and DPO. Everything follows from the versions of Python and ruff and from the options; nothing is done when they are unchanged.
"""

import argparse
import ast
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics

from bitnet_train.data.chat import encode_chat
from bitnet_train.data.sources import Message
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.errors import UserError, run_command
from bitnet_train.formats.atomic import atomic_folder

Texts = dict[str, str]  # name -> text
JsonRow = Mapping[str, object]

HELDOUT_BYTES = 48_000  # of held-out English; whole families, so that it is a little more
HELDOUT_RULES = 10  # percent
PASSAGE = 8  # words in a row that two texts must not share
MAX_CODE_BYTES = 100_000  # larger modules are tables, or one author's style many times over
MAX_CHAT_TOKENS = 512

# Parts of the standard library that are tests, generated, tables, other people's wheels, or the held-out text itself.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "pydoc_data", "turtledemo"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__", "_sysconfigdata"}

WHAT = (
    "What does the ruff rule `{name}` check?",
    "What does `{name}` look for?",
    "Explain what the rule `{name}` does.",
    "My linter reports `{name}`. What did it find?",
)
WHY = (
    "Why is it bad to break the ruff rule `{name}`?",
    "Why does `{name}` matter?",
    "Explain why the rule `{name}` exists.",
    "My linter reports `{name}`. Why should I care?",
)


def english() -> Texts:
    """The topics of Python's help(), from the longest; those that longer ones repeat are left out."""
    kept: Texts = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        here = passages(topics[name])
        if len(here & seen) < 0.5 * max(len(here), 1):
            kept[name] = topics[name].strip()
            seen |= here
    return kept


def library() -> Texts:
    """The standard library's modules: path -> source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not SKIPPED & set(file.relative_to(root).parts)]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def docstrings(source: str) -> str:
    """The docstrings of a module as prose: `name(arguments)`, then the docstring, indented as in Python's help()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in other people's strings
        tree = ast.parse(source)
    return "\n\n".join([ast.get_docstring(tree) or "", *_documented(tree, "")]).strip()


def _documented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text:
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield f"{prefix}{node.name}{arguments}\n\n" + re.sub(r"^(?=.)", "   ", text, flags=re.MULTILINE)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{prefix}{node.name}.")


def passages(text: str) -> set[str]:
    """All runs of eight words of a text, without case, punctuation and line breaks."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + PASSAGE]) for i in range(len(words) - PASSAGE + 1)}


def families(texts: Texts) -> list[list[str]]:
    """Names in groups that share no passage with each other; in the order of a hash, which no one chose."""
    group = {name: [name] for name in texts}
    first: dict[str, str] = {}
    for name, text in texts.items():
        for passage in passages(text):
            ours, theirs = group[name], group[first.setdefault(passage, name)]
            if ours is not theirs:
                theirs += ours
                group |= dict.fromkeys(ours, theirs)
    return sorted({id(names): names for names in group.values()}.values(), key=lambda names: digest(min(names)))


def digest(text: str) -> str:
    """SHA-256, for choices that are the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def heldout_topics(texts: Texts) -> set[str]:
    """Families of topics, the largest excepted, until they hold HELDOUT_BYTES."""
    groups = families(texts)
    groups.remove(max(groups, key=lambda names: sum(len(texts[name]) for name in names)))
    chosen: set[str] = set()
    for names in groups:
        if sum(len(texts[name].encode()) for name in chosen) < HELDOUT_BYTES:
            chosen |= set(names)
    return chosen


def pretraining() -> dict[str, Texts]:
    """Documents of english, docstrings, code and heldout; what shares a passage with heldout is in none of the others."""
    prose, modules = english(), library()
    chosen = heldout_topics(prose)
    heldout = {name: prose[name] for name in sorted(chosen)}
    secret = set().union(*map(passages, heldout.values()))
    parts = {
        "english": {name: text for name, text in prose.items() if name not in chosen},
        "docstrings": {name: docstrings(source) for name, source in modules.items()},
        "code": {name: source for name, source in modules.items() if len(source) <= MAX_CODE_BYTES},
    }
    clean = {part: {n: t for n, t in texts.items() if t and not secret & passages(t)} for part, texts in parts.items()}
    return {**clean, "heldout": heldout}
