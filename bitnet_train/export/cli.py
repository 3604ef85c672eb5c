"""The command `bitnet-export SRC OUT`, also `python tools/export.py SRC OUT`."""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from bitnet_train.errors import EXIT_FAILURE, ArgumentParser, UserError, printable, report, run_command
from bitnet_train.export import hub, runtimes
from bitnet_train.export.exporter import DTYPES, ExportResult, export
from bitnet_train.export.readback import NotVerifiedError
from bitnet_train.export.source import open_source
from bitnet_train.export.targets import FORMATS, GGUF_TYPES, TARGETS, readers, refusal
from bitnet_train.formats.hf_folder import LINEAR_CLASSES
from bitnet_train.formats.safetensors_file import MAX_SHARD_BYTES
from bitnet_train.memory import keep_freed_memory

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="bitnet-export", description="Write a trained BitNet model in a format of others.")
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="a run directory, a checkpoint, a model folder or a GGUF file")
    add("target", metavar="OUT", type=Path, nargs="?", help="the folder, or GGUF file, to write")
    add("--list", action="store_true", help="print where this model can go, and why not elsewhere; writes nothing")
    add("--format", choices=FORMATS, help="packed safetensors, GGUF, or master weights")
    add("--type", choices=GGUF_TYPES, help="GGUF: type of the ternary matrices (default: i2_s)")
    add("--linear-class", choices=LINEAR_CLASSES, help="safetensors: stores g (default), or 1 / g as Falcon-E")
    add("--dtype", choices=DTYPES, help="folders: dtype of the float tensors (default: bfloat16; master: as is)")
    add("--max-shard-size", metavar="SIZE", help="folders: cut the weights into files of 500MB, 5GB (default), ...")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="also run transformers, ik_llama.cpp or llama.cpp, where installed, on real text, prompts and awkward "
        "texts. Reading the result back and comparing every code and scale is done without asking; --no-verify "
        "leaves it out. What is not as it was trained is not kept",
    )
    add("--text", metavar="FILE", type=Path, help="--verify: the text to run (default: help pages of Python)")
    add("--force", action="store_true", help="replace an earlier export at OUT")
    add("--quantize", action="store_true", help="take the weights of a dense BitNet folder for masters")
    add("--tokenizer", metavar="DIR", type=Path, help="a folder with tokenizer.json, in place of the model's own")
    add("--name", help="what to call the model (default: the name of the run or folder)")
    add("--license", metavar="SPDX", help="licence of the weights, such as mit (default: that of the source's card)")
    add("--push-to-hub", metavar="REPO", help="show what an upload to this repository of the hub would send")
    add("--no-dry-run", action="store_true", help="with --push-to-hub: do send it")
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Exports as the command line says; 1 where the verification found a difference, or writing failed."""
    keep_freed_memory(one_arena=True)
    args = _parser().parse_args(arguments)
    if args.list:
        return _list(args)
    _check(args)
    try:
        result = _export(args)
    except OSError as error:
        report(f"{args.target}: cannot be written: {error.strerror}; nothing was changed")
        return EXIT_FAILURE
    except NotVerifiedError as error:
        report(error)
        return EXIT_FAILURE
    _tell(result, bool(args.verify))
    if args.push_to_hub:
        hub.push(result.path, result.card, args.push_to_hub, dry_run=not args.no_dry_run)
    return 0


def _list(args: argparse.Namespace) -> int:
    source = open_source(args.source, quantize=args.quantize, tokenizer=args.tokenizer)
    for target in TARGETS:
        reason = refusal(source, target)
        told = f"yes   {', '.join(readers(source, target))}" if reason is None else f"no    {reason}"
        print(printable(f"{target!s:27} {told}"))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that do not belong together."""
    if args.target is None:
        raise UserError("the following arguments are required: OUT; or --list, to see where the model can go")
    if args.format is None:
        raise UserError(f"the following arguments are required: --format ({', '.join(FORMATS)})")
    for option, formats in {
        "type": ["gguf"],
        "linear_class": ["safetensors"],
        "dtype": ["safetensors", "master"],
        "max_shard_size": ["safetensors", "master"],
    }.items():
        if getattr(args, option) is not None and args.format not in formats:
            raise UserError(
                f"--{option.replace('_', '-')} belongs to --format {' and '.join(formats)}, got --format "
                f"{args.format}; leave it out"
            )
    if args.push_to_hub:
        hub.check_repository(args.push_to_hub)
    if args.no_dry_run and not args.push_to_hub:
        raise UserError("--no-dry-run belongs to --push-to-hub REPO, got none; leave it out")
    if args.text is not None and not args.verify:
        raise UserError("--text belongs to --verify, got none; leave it out")


def _export(args: argparse.Namespace) -> ExportResult:
    return export(
        args.source,
        args.target,
        format=args.format,
        type=args.type or "i2_s",
        linear_class=args.linear_class or LINEAR_CLASSES[0],
        dtype=args.dtype,
        max_shard_bytes=MAX_SHARD_BYTES if args.max_shard_size is None else _bytes(args.max_shard_size),
        verify=args.verify is not False,
        examine=partial(runtimes.compare, text=args.text) if args.verify else None,
        force=args.force,
        quantize=args.quantize,
        tokenizer=args.tokenizer,
        name=args.name,
        licence=args.license,
    )


def _bytes(size: str) -> int:
    """500MB, 5GB, 2GiB or a number of bytes."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", size)
    if match is None or match[2].upper() not in _UNITS or int(match[1]) < 1:
        raise UserError(f"--max-shard-size must be a size such as 500MB or 5GB, got {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _tell(result: ExportResult, in_full: bool) -> None:
    """Prints what was written and found; in full also what became of everything in the source."""
    print(printable(f"wrote {result.path} ({result.bytes / 1e6:.1f} MB)"))
    for note in result.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    if result.verification is not None:
        print(printable(str(result.verification)))
    for account in result.accounts if in_full else ():
        print(printable(str(account)))
    for comparison in result.reports:
        for line in comparison.lines():
            print(printable(line.text))


def main() -> NoReturn:
    """Entry point of the console script."""
    run_command(run)
