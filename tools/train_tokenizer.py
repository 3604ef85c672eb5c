"""A byte-level BPE of one's own text, with LLaMA-3's split rule and special tokens.

python tools/train_tokenizer.py OUT --data rows.jsonl more/ --vocab-size 32000
"""

from collections.abc import Iterator
from pathlib import Path

from bitnet_train.data.conversation import messages_of, text_of
from bitnet_train.data.parts import at_blanks
from bitnet_train.data.preference import pair_of
from bitnet_train.data.sources import Row, read_rows
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.options import integer


def main() -> None:
    """Reads the command line, writes OUT/tokenizer.json and OUT/tokenizer_config.json."""
    parser = ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the result")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="texts, conversations or preferences")
    parser.add_argument(
        "--vocab-size", type=integer(1, 1 << 24), default=32_000, help="special tokens included (default: %(default)s)"
    )
    arguments = parser.parse_args()
    rows = read_rows(arguments.data, cut=at_blanks)
    tokenizer = train_bpe((text for row in rows for text in texts(row)), arguments.vocab_size)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens")


def texts(row: Row) -> Iterator[str]:
    """What people wrote in a row of any kind."""
    if "text" in row.fields:
        yield text_of(row)
    elif "chosen" in row.fields:
        pair = pair_of(row)
        yield from (message["content"] for message in (*pair.prompt, *pair.chosen, *pair.rejected))
    else:
        yield from (message["content"] for message in messages_of(row))


if __name__ == "__main__":
    run_command(main)
