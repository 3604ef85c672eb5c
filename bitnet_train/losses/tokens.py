"""Losses over tokens, as sums.

token_logps      log p(label_t | prefix), never holding `(tokens, vocab)` logits
cross_entropy    - sum_t log p(label_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label that carries no loss, as in torch and transformers
LOGITS_PER_CHUNK = 1 << 24  # 64 MB of float32 logits at a time


def _chunk_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label in nats, float32, in the shape of `labels`; 0 where the label is IGNORE_INDEX.

    Only positions with a label meet the head, a chunk at a time; a chunk's logits are made again in the backward pass.

    Args:
        hidden: `(..., hidden)`, the decoder's output.
        weight: `(vocab, hidden)`, the head. The product runs in autocast's dtype, the softmax in float32.
        labels: int64 `(...)`, the id that follows each position.
    """
    kept = labels != IGNORE_INDEX
    states, targets = hidden[kept], labels[kept]
    rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    chunks = [
        checkpoint(_chunk_logps, h, weight, y, use_reentrant=False)
        for h, y in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(kept, torch.cat(chunks))


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-sum log p(label), in nats; arguments as in `token_logps`."""
    return -token_logps(hidden, weight, labels).sum()
