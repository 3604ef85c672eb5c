"""A stored model and its tokenizer, for inference."""

from pathlib import Path
from typing import NamedTuple

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import load_for_inference, source_folder


class Loaded(NamedTuple):
    """A decoder whose ternary matrices are codes, and the tokenizer that it was trained with."""

    model: BitNetForCausalLM
    tokenizer: Tokenizer


def load(source: str, name: str) -> Loaded:
    """The model of a run directory, a folder (master, packed or dense), a GGUF file or a hub id.

    Args:
        source: what the user gave.
        name: what it was given for; stands in the message.

    Raises:
        UserError: there is no model, it is damaged, or its tokenizer has ids without a row in the embedding.
    """
    folder = source_folder(source, name)
    model, tokenizer = load_for_inference(folder), Tokenizer.from_folder(folder)
    check_tokenizer_fits(folder, model, tokenizer)
    return Loaded(model, tokenizer)


def check_tokenizer_fits(folder: Path, model: BitNetForCausalLM, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer with ids that the embedding has no row for: a text may hold any of them."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: every id of the tokenizer must be below the model's vocab_size ({model.config.vocab_size}), "
            f"got {tokenizer.vocab_size - 1}; give the tokenizer that the model was trained with"
        )
