"""`python tools/generate.py SRC`: a prompt, a file of prompts, or a chat.

    --prompt TEXT [--chat]      the continuation, or the answer
    --prompts FILE [--chat]     per prompt a JSON object: the row's fields and `completion`
    --chat                      a conversation in the terminal

Every completion starts from --seed and does not depend on those before it.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import partial

import torch

from bitnet_train.data.conversation import check_text
from bitnet_train.data.readers import format_of, is_readable
from bitnet_train.data.sources import Row, located, read_rows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import ArgumentParser, UserError, run_command, shown
from bitnet_train.generate.loading import load
from bitnet_train.generate.sampling import Sampling, prompt_ids_of, stream
from bitnet_train.generate.session import ChatSession
from bitnet_train.generate.terminal import chat
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.options import integer, number, seed, text


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="bitnet-generate", description="Generate text with a BitNet model.")
    add = parser.add_argument
    add("source", metavar="SRC", help="run directory, HF folder (master or packed) or GGUF file")
    add("--prompt", type=text, metavar="TEXT", help="text to continue, or the user's message with --chat")
    add("--prompts", metavar="FILE", help=".txt with a prompt per line, or rows with a field prompt; prints .jsonl")
    add("--chat", action="store_true", help="send prompts through the chat template; without any, chat in the terminal")
    add("--system", type=text, metavar="TEXT", help="with --chat: the system message")
    add(
        "--max-new-tokens",
        type=integer(1),
        default=128,
        metavar="N",
        help="of a completion or an answer (default: 128)",
    )
    add("--temperature", type=number(0), default=0.0, metavar="T", help="0 (default) is greedy")
    add(
        "--top-p",
        type=number(0, 1),
        default=1.0,
        metavar="P",
        help="sample from the likeliest ids that reach P together",
    )
    add("--seed", type=seed, default=0)
    return parser


def _check(args: argparse.Namespace) -> None:
    _how(args)
    if args.prompt is not None and args.prompts is not None:
        raise UserError("--prompt and --prompts exclude each other; leave one out")
    if args.prompt is None and args.prompts is None and not args.chat:
        raise UserError("nothing to generate from; give --prompt TEXT, --prompts FILE or --chat")
    if args.system is not None and not args.chat:
        raise UserError("--system belongs to --chat, got none; leave it out")


def _main() -> None:
    args = _parser().parse_args()
    _check(args)
    model, tokenizer = load(args.source, "SRC")
    if args.prompts is not None:
        _complete_all(args, model, tokenizer)
    elif args.prompt is not None:
        print(shown("".join(_completion(args, model, tokenizer, args.prompt)), sys.stdout))
    else:
        chat(_session(args, model, tokenizer))


def _completion(args: argparse.Namespace, model: BitNetForCausalLM, tokenizer: Tokenizer, prompt: str) -> Iterator[str]:
    """What follows a prompt; the same whatever was generated before it."""
    ids, generator = prompt_ids_of(tokenizer, prompt, args.chat, args.system), _generator(args)
    return stream(model, tokenizer, ids, args.max_new_tokens, _how(args), generator)


def _how(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p)


def _generator(args: argparse.Namespace) -> torch.Generator:
    return torch.Generator().manual_seed(args.seed)


def _complete_all(args: argparse.Namespace, model: BitNetForCausalLM, tokenizer: Tokenizer) -> None:
    """Prints a line per prompt, once all of them have been found to be in order."""
    rows = list(_prompt_rows(args.prompts))
    completions = []
    for row in rows:
        with located(row):
            prompt = check_text(row.fields.get("prompt"), "prompt")
            completions.append(_completion(args, model, tokenizer, prompt))
    for row, completion in zip(rows, completions, strict=True):
        line = json.dumps({**row.fields, "completion": "".join(completion)}, ensure_ascii=False)
        print(shown(line, sys.stdout), flush=True)


def _prompt_rows(file: str) -> Iterator[Row]:
    """Rows with their fields; of a .txt file the lines that are not blank."""
    for row in read_rows(file):
        if is_readable(row.file) and format_of(row.file) == ".txt":
            lines = enumerate(re.split("\r?\n", str(row.fields["text"])), start=1)  # a form feed begins no prompt
            yield from (Row(row.file, number, {"prompt": line}) for number, line in lines if line.strip())
        else:
            yield row


def _session(args: argparse.Namespace, model: BitNetForCausalLM, tokenizer: Tokenizer) -> ChatSession:
    """A chat that leaves room for an answer: of --max-new-tokens, but no more than half of the context."""
    how = {"max_new_tokens": args.max_new_tokens, "how": _how(args), "generator": _generator(args)}
    answer = partial(stream, model, tokenizer, **how)
    context = model.config.max_position_embeddings
    return ChatSession(tokenizer, answer, context - min(args.max_new_tokens, context // 2), args.system)


def main() -> None:
    """Entry point of `bitnet-generate`."""
    run_command(_main)
