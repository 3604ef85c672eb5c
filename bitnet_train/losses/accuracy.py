"""How often a label is the model's first guess."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses.tokens import positions_at_once


@torch.no_grad()
def is_top1(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whether each label has the highest logit, bool in the shape of `labels`; False where it is IGNORE_INDEX.

    Never holds `(tokens, vocab)` logits.

    Args:
        hidden: `(..., hidden)`, the decoder's output.
        weight: `(vocab, hidden)`, the head.
        labels: int64 `(...)`, the id that follows each position, or IGNORE_INDEX.
    """
    kept = labels != IGNORE_INDEX
    rows = positions_at_once(weight)
    chunks = zip(hidden[kept].split(rows), labels[kept].split(rows), strict=True)
    guessed = torch.cat([F.linear(h, weight).argmax(dim=-1) == y for h, y in chunks])
    return torch.zeros_like(kept).masked_scatter(kept, guessed)


def correct_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The number of labels with the highest logit, int64, shape (); arguments as in `is_top1`."""
    return is_top1(hidden, weight, labels).sum()
