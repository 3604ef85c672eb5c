"""From token ids to rows of a fixed length: a stream that is cut (pre-training) or whole bins (conversations).

A row has sequence_length + 1 ids, so that it gives sequence_length positions with a label each. Rows of a stream
overlap by that one id: every token of a corpus but the first of each document is predicted exactly once per epoch.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet_train.data.batches import PairBatch, TokenBatch, TokenRow, collate


class StreamRows:
    """Documents joined to one stream and cut every `sequence_length` ids. The last row may be shorter.

    Args:
        documents: token ids of each document, beginning with BOS and ending with EOS.
        sequence_length: positions per row.
    """

    def __init__(self, documents: Sequence[Sequence[int]], sequence_length: int, pad_id: int) -> None:
        self.ids = np.concatenate([np.asarray(document, dtype=np.uint32) for document in documents])
        self.starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
        self.sequence_length, self.pad_id = sequence_length, pad_id

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the stream and of where its documents start."""
        return hashlib.sha256(self.ids.tobytes() + self.starts.tobytes()).hexdigest()

    def collate(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """See `batches.collate`."""
        return collate(rows, self.pad_id)

    def __len__(self) -> int:
        return max(1, -(-(len(self.ids) - 1) // self.sequence_length))

    def __getitem__(self, index: int) -> TokenRow:
        begin = index * self.sequence_length
        ids = self.ids[begin : begin + self.sequence_length + 1].astype(np.int64)
        positions = np.arange(begin, begin + len(ids))
        documents = np.searchsorted(self.starts, positions, side="right") - 1
        return TokenRow(ids, np.ones(len(ids), dtype=np.int64), documents - documents[0])


class PackedRows:
    """Conversations put together to rows of at most `sequence_length + 1` ids, none of them cut.

    Args:
        ids: token ids of each conversation.
        trained: for each id whether it carries loss.
        sequence_length: positions per row; a conversation has at most sequence_length + 1 ids.
    """

    def __init__(
        self, ids: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]], sequence_length: int, pad_id: int
    ) -> None:
        self.ids, self.trained, self.pad_id = ids, trained, pad_id
        self.bins = best_fit([len(conversation) for conversation in ids], sequence_length + 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every row's ids, mask and documents."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(np.stack(self[index]).tobytes())
        return digest.hexdigest()

    def collate(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """See `batches.collate`."""
        return collate(rows, self.pad_id)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> TokenRow:
        members = self.bins[index]
        lengths = [len(self.ids[m]) for m in members]
        return TokenRow(
            np.concatenate([np.asarray(self.ids[m], dtype=np.int64) for m in members]),
            np.concatenate([np.asarray(self.trained[m], dtype=np.int64) for m in members]),
            np.repeat(np.arange(len(members)), lengths),
        )


class PairRow(NamedTuple):
    """A preference pair and its number: two rows of prompt and completion, the completion trained."""

    number: int
    chosen: TokenRow
    rejected: TokenRow


def completion_row(prompt: Sequence[int], completion: Sequence[int]) -> TokenRow:
    """One document of prompt and completion, of which the completion is trained."""
    ids = np.asarray([*prompt, *completion], dtype=np.int64)
    trained = np.arange(len(ids)) >= len(prompt)
    return TokenRow(ids, trained.astype(np.int64), np.zeros_like(ids))


class PairRows:
    """Preference pairs, a row per completion.

    Attributes:
        fingerprint: hash of every id and mask; with the weights' hash it names the cached reference.
        reference_logps: float32 `(2, pairs)`, set by the DPO stage before training.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        pad_id: int,
    ) -> None:
        self.pairs = [
            PairRow(i, completion_row(prompts[i], chosen[i]), completion_row(prompts[i], rejected[i]))
            for i in range(len(prompts))
        ]
        self.pad_id = pad_id
        self.reference_logps: Tensor | None = None
        digest = hashlib.sha256()
        for pair in self.pairs:
            for row in (pair.chosen, pair.rejected):
                digest.update(np.stack((row.ids, row.trained)).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairRow:
        return self.pairs[index]

    def collate(self, pairs: Sequence[PairRow]) -> PairBatch:
        """Chosen rows, then rejected rows, padded to the longest; the reference is NaN until it is known."""
        tokens = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], self.pad_id)
        if self.reference_logps is None:
            return PairBatch(tokens, torch.full((2, len(pairs)), float("nan")))
        return PairBatch(tokens, self.reference_logps[:, [p.number for p in pairs]])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, into the bin with the least room that still takes it.

    Johnson et al., SIAM J. Comput. 3 (1974): at most 11/9 of the optimal number of bins. Rooms are at most `capacity`
    numbers, so that a list of bins per room finds the bin in O(capacity).
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        assert length <= capacity, (length, capacity)
        room = next((r for r in range(length, capacity + 1) if by_room[r]), None)
        if room is None:
            bins.append([])
            number, room = len(bins) - 1, capacity
        else:
            number = by_room[room].pop()
        bins[number].append(item)
        by_room[room - length].append(number)
    return [sorted(members) for members in bins]
