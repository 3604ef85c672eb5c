"""Log-likelihood of given continuations, many at a time.

    log p(continuation | context) = sum_t log p(id_t | context, ids before t)

Requests are sorted by length and run in batches of about equal ones. What stands beside a request changes nothing: an
int8 scale belongs to one token, and padding is a document of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet_train.data.batches import TokenBatch, TokenRow, collate
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses.accuracy import is_top1
from bitnet_train.losses.tokens import token_logps
from bitnet_train.model.decoder import BitNetForCausalLM

_POSITIONS_AT_ONCE = 8192  # of a batch, padding included


class Request(NamedTuple):
    """Ids of a context, BOS first, and of what may follow it."""

    context: list[int]
    continuation: list[int]

    @property
    def positions(self) -> int:
        """Positions that the model has to run."""
        return len(self.context) + len(self.continuation) - 1


class Score(NamedTuple):
    """log p of a whole continuation in nats, and whether greedy decoding would produce it."""

    logp: float
    is_greedy: bool


def request_of(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The ids of both texts, tokenized in one go, as a document that holds them is.

    White space at the end of the context belongs to the first word of the continuation. Where a token would reach over
    the border, the two are tokenized apart.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before, whole = tokenizer.encode_batch([stripped, stripped + continuation])
    if whole[: len(before)] != before or len(whole) == len(before):
        whole = before + tokenizer.encode(continuation)
    return Request(tokenizer.begun(before) or [tokenizer.prefix_token_id], whole[len(before) :])


def check_fits(model: BitNetForCausalLM, request: Request) -> None:
    """Raises UserError for a request that is longer than the model's context."""
    limit = model.config.max_position_embeddings
    if request.positions > limit:
        raise UserError(f"the row needs {request.positions} positions, the context has {limit}; shorten or drop it")


@torch.inference_mode()
def score(model: BitNetForCausalLM, requests: Sequence[Request]) -> list[Score]:
    """The score of every request, in their order; each must fit into the model's context."""
    scores = [Score(0.0, True)] * len(requests)
    for indices in _batches([request.positions for request in requests]):
        hidden, labels = run_batch(model, collate([_row(requests[i]) for i in indices], pad_id=0))
        logps = token_logps(hidden, model.head_weight, labels).double().sum(dim=-1)
        greedy = (is_top1(hidden, model.head_weight, labels) | (labels == IGNORE_INDEX)).all(dim=-1)
        for i, logp, is_greedy in zip(indices, logps.tolist(), greedy.tolist(), strict=True):
            scores[i] = Score(logp, is_greedy)
    return scores


def run_batch(model: BitNetForCausalLM, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The decoder's output `(batch, seq, hidden)` and the labels `(batch, seq)`, on the model's device."""
    ids, labels, positions, documents = (field.to(model.head_weight.device) for field in batch)
    return model.model(ids, position_ids=positions, document_ids=documents), labels


def _row(request: Request) -> TokenRow:
    ids = np.array([*request.context, *request.continuation])
    return TokenRow(ids, trained=np.arange(len(ids)) >= len(request.context), documents=np.zeros_like(ids))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of all requests, the longest first, so that what does not fit into memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > _POSITIONS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
