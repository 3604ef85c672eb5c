"""Likelihood of held-out text.

    nll            - sum log p(token) / tokens                nats per token
    perplexity     exp(nll)
    bits_per_byte  - sum log2 p(token) / bytes of the text    comparable between tokenizers, and with a compressor

Text is read as in pre-training: BOS + document + EOS, joined and cut to rows as long as the model's context;
every token but BOS is predicted once, EOS included. Of conversations the answers alone count, with their end-of-turn
token. Bytes are those of the text where all of it is predicted; in conversations, and where there is no BOS from which
a first token could be predicted, those that the predicted tokens stand for, as in the log of a run.
"""

import math
from itertools import islice
from typing import TypedDict

import torch

from bitnet_train.data.batches import label_bytes
from bitnet_train.data.config import ChatData, Rows, TextData
from bitnet_train.data.conversation import text_of
from bitnet_train.data.parts import anywhere
from bitnet_train.data.sources import read_rows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.evaluation.scoring import run_batch
from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses.tokens import cross_entropy_sum
from bitnet_train.model.decoder import BitNetForCausalLM

_ROWS_AT_ONCE = 4
_LONGEST_ROW = 1 << 17  # positions: what is longer no model was trained with, and a context is but a number in a file


class Likelihood(TypedDict):
    """What `evaluate` measures; see the module's text."""

    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    model: BitNetForCausalLM, tokenizer: Tokenizer, paths: str | list[str], sequence_length: int | None = None
) -> Likelihood:
    """The likelihood of documents, or of the answers of conversations, whichever the first row is.

    Args:
        model: any decoder, trained or imported.
        tokenizer: the model's own.
        paths: files, globs, folders or hub ids.
        sequence_length: positions per row; the model's context if absent, but no more than `_LONGEST_ROW`.
    """
    length = sequence_length or min(model.config.max_position_embeddings, _LONGEST_ROW)
    if length > model.config.max_position_embeddings:
        raise UserError(
            f"--sequence-length must be at most the context ({model.config.max_position_embeddings}), got {length}"
        )
    is_text = _holds_text(paths)
    if is_text:
        rows: Rows = TextData(sequence_length=length).rows(paths, tokenizer)
    else:
        rows = ChatData(sequence_length=length, long_rows="error").rows(paths, tokenizer)
    nll_sum, tokens, size = total_nll(model, rows, tokenizer)
    if is_text and tokenizer.bos_token_id is not None:  # a tokenizer may lose characters that a text has
        size = sum(len(text_of(row).encode()) for row in read_rows(paths, cut=anywhere))
    nll = nll_sum / tokens
    bits_per_byte = nll_sum / math.log(2) / size
    return Likelihood(nll=nll, perplexity=math.exp(nll), bits_per_byte=bits_per_byte, tokens=tokens, bytes=size)


def _holds_text(paths: str | list[str]) -> bool:
    first = next(islice(read_rows(paths, cut=anywhere), 1))
    return "text" in first.fields


@torch.inference_mode()
def total_nll(model: BitNetForCausalLM, rows: Rows, tokenizer: Tokenizer) -> tuple[float, int, int]:
    """-sum log p(label) in nats over all rows, the number of labels, and the bytes that they stand for."""
    total, tokens, size = 0.0, 0, 0
    lengths = torch.tensor([tokenizer.byte_lengths, tokenizer.first_byte_lengths])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows.collate([rows[i] for i in range(start, min(start + _ROWS_AT_ONCE, len(rows)))])
        hidden, labels = run_batch(model, batch)
        total += float(cross_entropy_sum(hidden, model.head_weight, labels))
        tokens += int((labels != IGNORE_INDEX).sum())
        size += int(label_bytes(batch, lengths, tokenizer.bos_token_id))
    return total, tokens, size
