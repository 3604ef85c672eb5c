"""LLaMA-3's tokenizer.model (tiktoken's format) as a tokenizer.json of 128,256 tokens.

    line of tokenizer.model     base64 of a token's bytes, its rank         128,000 ranks = ids
    merges                      every (left, right) whose bytes joined are a token, ordered by the rank of the join
    specials                    256 names in id order from 128,000 on

tiktoken joins the neighbours whose join has the lowest rank; tokenizers joins the pair that stands first in its list of
merges: ordered by the rank of the join, both do the same. A piece of text that is a token is taken whole
(`ignore_merges`), for some tokens cannot be reached by joins.

Source: llama-models, models/llama3/tokenizer.py, for the split rule and the specials of Llama 3.0, which are those of
microsoft/BitNet (gpu/tokenizer.py). The file comes with `pip download --no-deps llama-models==0.3.0`; it is under the
Llama 3 Community License.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import models

from bitnet_train.data.tokenizer import Tokenizer, byte_level
from bitnet_train.errors import UserError

RANKS, SPECIALS = 128_000, 256
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}


def special_tokens() -> list[str]:
    """The 256 special tokens in id order; those without a name are numbered among themselves."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(SPECIALS))
    return [_NAMED.get(index) or next(reserved) for index in range(SPECIALS)]


def from_tiktoken(file: Path) -> Tokenizer:
    """The tokenizer of LLaMA-3's tokenizer.model.

    Raises:
        UserError: the file is missing, or is not what the module's text says.
    """
    ranks = _ranks(file)
    as_text = _byte_characters()
    vocab = {_spelled(token, as_text): rank for token, rank in ranks.items()}
    merges = [(_spelled(left, as_text), _spelled(right, as_text)) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    return byte_level(backend, special_tokens())


def _ranks(file: Path) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name LLaMA-3's tokenizer.model") from None
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{file}: every line must be a base64 token and its rank ({error})") from None
    if list(ranks.values()) != list(range(RANKS)):
        raise UserError(f"{file}: must hold the ranks 0 to {RANKS - 1} in order, got {len(ranks)} tokens")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every split of every token into two tokens, in the order of the tokens' ranks."""
    for token in ranks:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte (GPT-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _spelled(token: bytes, characters: list[str]) -> str:
    return "".join(characters[byte] for byte in token)
