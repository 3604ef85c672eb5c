"""`python tools/evaluate.py SRC --data PATH ...`: one JSON object on stdout."""

import argparse
import json

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import run_command
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.model.pretrained import load_for_inference, source_folder


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Negative log-likelihood, perplexity and bits per byte of held-out data."
    )
    parser.add_argument("source", metavar="SRC", help="run directory, HF folder (master or packed) or GGUF file")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="documents or conversations")
    parser.add_argument("--sequence-length", type=int, default=None, metavar="N", help="positions per row")
    arguments = parser.parse_args()
    folder = source_folder(arguments.source, "SRC")
    model, tokenizer = load_for_inference(folder), Tokenizer.from_folder(folder)
    print(json.dumps(evaluate(model, tokenizer, arguments.data, arguments.sequence_length)))


def main() -> None:
    """Entry point of `bitnet-evaluate`."""
    run_command(_main)
