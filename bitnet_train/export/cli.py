"""The command `bitnet-export SRC OUT`, also `python tools/export.py SRC OUT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bitnet_train.errors import UserError, run_command
from bitnet_train.export.writers import DTYPES, FORMATS, GGUF_TARGETS, export


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bitnet-export", description="Write a trained BitNet model in a format that others read.")
    parser.add_argument("source", metavar="SRC", type=Path, help="a run directory, or a model folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="the folder, or GGUF file, to write")
    parser.add_argument("--format", choices=FORMATS, required=True, help="packed safetensors, GGUF, or master weights")
    parser.add_argument("--type", choices=GGUF_TARGETS, help="GGUF: type of the ternary matrices (default: i2_s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="folders: dtype of the float tensors (default: bfloat16; master: as is)"
    )
    parser.add_argument("--verify", action="store_true", help="read the result back and compare every code and scale")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at OUT")
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Exports as the command line says; 1 where the verification found a difference."""
    args = _parser().parse_args(arguments)
    if args.type and args.format != "gguf":
        raise UserError(f"--type belongs to --format gguf, got --format {args.format}; leave it out")
    if args.dtype and args.format == "gguf":
        raise UserError("--dtype belongs to --format safetensors and master, got --format gguf; use --type")
    result = export(
        args.source,
        args.target,
        format=args.format,
        type=args.type or "i2_s",
        dtype=args.dtype,
        check=args.verify,
        force=args.force,
    )
    print(f"wrote {result.path} ({result.bytes / 1e6:.1f} MB)")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if result.verification is None:
        return 0
    if result.verification.mismatches:
        print(f"error: {result.path}: {result.verification}", file=sys.stderr)
        return 1
    print(result.verification)
    return 0


def main() -> NoReturn:
    """Entry point of the console script."""
    run_command(run)
