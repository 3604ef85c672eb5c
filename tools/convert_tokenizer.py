"""LLaMA-3's tokenizer.model to the files that transformers and this project read.

pip download --no-deps llama-models==0.3.0 && unzip -j llama_models-*.whl llama_models/llama3/tokenizer.model
python tools/convert_tokenizer.py tokenizer.model OUT
"""

from pathlib import Path

from bitnet_train.data.llama3 import from_tiktoken
from bitnet_train.errors import ArgumentParser, run_command


def main() -> None:
    """Reads the command line, writes OUT/tokenizer.json and OUT/tokenizer_config.json."""
    parser = ArgumentParser(description="Convert LLaMA-3's tokenizer.model to tokenizer.json.")
    parser.add_argument("model", metavar="TOKENIZER.MODEL", type=Path, help="tiktoken's format, 128,000 ranks")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the result")
    arguments = parser.parse_args()
    tokenizer = from_tiktoken(arguments.model)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    run_command(main)
