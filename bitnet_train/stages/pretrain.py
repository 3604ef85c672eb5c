"""Pre-training: the next token of every document, each trained token with the same weight."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet_train.data.batches import TokenBatch
from bitnet_train.errors import UserError
from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses.tokens import cross_entropy_sum, token_logps
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Mean, Reduction, Stage, StageOutput


def hidden_states(model: BitNetForCausalLM, batch: TokenBatch, inputs_embeds: Tensor | None = None) -> Tensor:
    """The decoder's output for a batch, `(batch, seq, hidden)`; embeddings take the place of the ids if given."""
    ids = batch.input_ids if inputs_embeds is None else None
    hidden: Tensor = model.model(
        ids, inputs_embeds=inputs_embeds, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    return hidden


def next_token_sums(model: BitNetForCausalLM, batch: TokenBatch, hidden: Tensor, z_loss: float = 0.0) -> StageOutput:
    """-sum log p(label) in nats over the labels of the batch, and their number; with the z-loss while training."""
    loss_sum = cross_entropy_sum(hidden, model.head_weight, batch.labels, z_loss if model.training else 0.0)
    return StageOutput(loss_sum, (batch.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Pretrain(Stage):
    """Mean cross-entropy over the tokens of the global batch.

    Attributes:
        position_buckets: where to cut the positions of a document for validation losses of their own, such as [1024,
            4096]: tokens that see fewer than 1024 others, fewer than 4096, and the rest. A model that makes use of a
            long context has lower losses in later buckets.
        z_loss: weight of the squared log-sum-exp of the logits (PaLM: 1e-4), which keeps them from drifting. Part of
            the training loss, not of the validation loss.
    """

    position_buckets: list[int] = field(default_factory=list)
    z_loss: float = 0.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted({0, *self.position_buckets})[1:] != list(self.position_buckets):
            raise UserError(f"stage.position_buckets must rise and lie above 0, got {list(self.position_buckets)}")
        if not self.z_loss >= 0.0:
            raise UserError(f"stage.z_loss must be at least 0, got {self.z_loss}")

    def step(self, model: BitNetForCausalLM, batch: TokenBatch) -> StageOutput:
        """Sums over the batch; at validation also by position."""
        hidden = hidden_states(model, batch)
        if model.training or not self.position_buckets:
            return next_token_sums(model, batch, hidden, self.z_loss)
        logps = token_logps(hidden, model.head_weight, batch.labels)
        kept = batch.labels != IGNORE_INDEX
        return StageOutput(-logps.sum(), kept.sum(), self._by_position(-logps[kept], batch.position_ids[kept]))

    def _by_position(self, losses: Tensor, positions: Tensor) -> dict[str, Mean]:
        """The losses `(tokens,)` by bucket: loss_at/0, loss_at/1024, ... after the first position of each."""
        edges = torch.tensor(self.position_buckets, device=positions.device)
        buckets = torch.bucketize(positions, edges, right=True)
        sums = torch.zeros(len(edges) + 1, device=losses.device).index_add_(0, buckets, losses)
        counts = torch.bincount(buckets, minlength=len(edges) + 1)
        return {f"loss_at/{start}": Mean(sums[i], counts[i]) for i, start in enumerate([0, *self.position_buckets])}
