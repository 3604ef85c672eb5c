"""`python tools/evaluate.py SRC`: one JSON object on stdout.

    --data PATH ...             the figures of `Likelihood`, of all paths together
    --data NAME=PATH ...        {NAME: figures}; paths of one name are one set
    --tasks [NAME=]PATH ...     {NAME: accuracy or exact match}; NAME is the file's if absent
    --lm-eval TASK ...          {TASK: metrics of lm-evaluation-harness}

Together they are one object with an entry for each, paths without a name under "data".
"""

import argparse
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from bitnet_train.data.paths import expand
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.evaluation.tasks import evaluate_task
from bitnet_train.generate.loading import load
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.options import integer

Figures = dict[str, Mapping[str, object]]  # of every set and task

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<path>.+)")
_UNNAMED = "data"
_BELONGS = {
    "sequence_length": ["data"],
    "include_path": ["lm_eval"],
    "num_fewshot": ["lm_eval"],
    "limit": ["lm_eval"],
    "chat": ["tasks", "lm_eval"],
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="bitnet-evaluate", description="Measure a BitNet model; one JSON object on stdout.")
    add = parser.add_argument
    add("source", metavar="SRC", help="run directory, HF folder (master or packed) or GGUF file")
    add("--data", nargs="+", default=[], metavar="[NAME=]PATH", help="documents or conversations: nll, bits per byte")
    add(
        "--sequence-length",
        type=integer(1),
        metavar="N",
        help="--data: positions per row (default: the context, at most 131072)",
    )
    add("--tasks", nargs="+", default=[], metavar="[NAME=]PATH", help="rows with choices or prompts, and answers")
    add("--max-new-tokens", type=integer(1), default=64, metavar="N", help="--tasks: of a text (default: 64)")
    add("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness (extra `eval`)")
    add("--include-path", type=Path, metavar="DIR", help="--lm-eval: a folder with tasks of your own; their code runs")
    add(
        "--num-fewshot",
        type=integer(0),
        metavar="N",
        help="--lm-eval: examples before a question (default: the task's)",
    )
    add("--limit", type=integer(1), metavar="N", help="--lm-eval: rows of each task (default: all)")
    add("--chat", action="store_true", help="--tasks, --lm-eval: send texts through the chat template")
    return parser


def _main() -> None:
    args = _parser().parse_args()
    _check(args)
    model, tokenizer = load(args.source, "SRC")
    entries: Figures = {}
    for name, figures in _measure(args, model, tokenizer):
        if name in entries:
            raise UserError(f"two sets or tasks are called {name!r}; name one of them: NAME=PATH")
        entries[name] = figures
    plain = list(_sets(args.data)) == [_UNNAMED] and len(entries) == 1
    print(json.dumps(entries[_UNNAMED] if plain else entries))


def _measure(
    args: argparse.Namespace, model: BitNetForCausalLM, tokenizer: Tokenizer
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The name and the figures of every set and task."""
    for name, paths in _sets(args.data).items():
        yield name, evaluate(model, tokenizer, paths, args.sequence_length)
    for argument in args.tasks:
        name, path = _split(argument, Path(argument).stem)
        yield name, evaluate_task(model, tokenizer, path, args.chat, args.max_new_tokens)
    if args.lm_eval:
        how = (args.include_path, args.num_fewshot, args.limit, args.chat)
        yield from _harness().run_tasks(model, tokenizer, args.lm_eval, *how).items()


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is loaded."""
    if not (args.data or args.tasks or args.lm_eval):
        raise UserError("nothing to measure; give --data, --tasks or --lm-eval")
    for option, needed in _BELONGS.items():
        if getattr(args, option) not in (None, False) and not any(getattr(args, name) for name in needed):
            owners = " and ".join(map(_option, needed))
            raise UserError(f"{_option(option)} belongs to {owners}, got none; leave it out")
    for argument in (*args.data, *args.tasks):
        expand(_split(argument, "")[1])
    if args.lm_eval:
        _harness()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _split(argument: str, default: str) -> tuple[str, str]:
    """Name and path of NAME=PATH; the default where there is no name, or where the whole is a path."""
    match = _NAMED.fullmatch(argument)
    return (default, argument) if match is None or os.path.lexists(argument) else (match["name"], match["path"])


def _sets(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The paths of every name."""
    sets: dict[str, list[str]] = {}
    for argument in arguments:
        name, path = _split(argument, _UNNAMED)
        sets.setdefault(name, []).append(path)
    return sets


def _harness() -> ModuleType:
    """The adapter; imported for those who ask for it, because it is heavy and may be absent."""
    try:
        return importlib.import_module("bitnet_train.evaluation.harness")
    except ImportError as error:
        raise UserError(f"--lm-eval: {error}") from error


def main() -> None:
    """Entry point of `bitnet-evaluate`."""
    run_command(_main)
