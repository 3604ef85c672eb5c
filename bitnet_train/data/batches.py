"""The batches that stages receive, and how rows of token ids become one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet_train.labels import IGNORE_INDEX


class TokenBatch(NamedTuple):
    """Rows of tokens, int64 `(batch, seq)` each.

    `labels[b, t]` is the id that position t predicts, or -100: already shifted. Positions restart with every document
    of a row, and equal `document_ids` within a row may see each other.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor


class PairBatch(NamedTuple):
    """Preference pairs: rows [0, pairs) of `tokens` are chosen, rows [pairs, 2 pairs) rejected.

    `reference_logps`, float32 `(2, pairs)`: the reference's log-probabilities of the completions, in nats.
    """

    tokens: TokenBatch
    reference_logps: Tensor


class TokenRow(NamedTuple):
    """One row, int64 `(seq,)` each: ids, and for each id whether it is trained and the number of its document."""

    ids: np.ndarray
    trained: np.ndarray
    documents: np.ndarray


def labels_of(row: TokenRow) -> np.ndarray:
    """The id that follows each position, -100 where it is not trained or belongs to another document. `(seq - 1,)`."""
    follows = row.trained[1:].astype(bool) & (row.documents[1:] == row.documents[:-1])
    return np.where(follows, row.ids[1:], IGNORE_INDEX)


def label_bytes(batch: TokenBatch, lengths: Tensor, bos_id: int | None) -> Tensor:
    """Bytes of text that the labels of a batch stand for, shape ().

    Args:
        lengths: int64 `(2, vocab)`: `Tokenizer.byte_lengths`, and `first_byte_lengths` for the label that follows BOS.
    """
    trained = batch.labels != IGNORE_INDEX
    first = batch.input_ids == bos_id if bos_id is not None else torch.zeros_like(trained)
    return lengths[first[trained].long(), batch.labels[trained]].sum()


def positions_of(documents: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal document numbers."""
    index = np.arange(len(documents))
    starts = np.concatenate(([True], documents[1:] != documents[:-1]))
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def collate(rows: Sequence[TokenRow], pad_id: int) -> TokenBatch:
    """Rows of any lengths to a batch as long as the longest: each row gives len - 1 positions, the rest is padding.

    Padding stands at the end, has no label, and is a document of its own, which nothing else sees.
    """
    length = max(len(row.ids) for row in rows) - 1
    fields = [np.zeros((len(rows), length), dtype=np.int64) for _ in TokenBatch._fields]
    input_ids, labels, position_ids, document_ids = fields
    input_ids[:], labels[:], document_ids[:] = pad_id, IGNORE_INDEX, -1
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        input_ids[i, :n], labels[i, :n] = row.ids[:-1], labels_of(row)
        position_ids[i, :n], document_ids[i, :n] = positions_of(row.documents[:-1]), row.documents[:-1]
    return TokenBatch(*(torch.from_numpy(field) for field in fields))
