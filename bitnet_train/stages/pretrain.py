"""Pre-training: the next token of every document, each trained token with the same weight."""

from dataclasses import dataclass

from bitnet_train.data.batches import TokenBatch
from bitnet_train.losses.tokens import IGNORE_INDEX, cross_entropy_sum
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Reduction, Stage, StageOutput


def next_token_step(model: BitNetForCausalLM, batch: TokenBatch) -> StageOutput:
    """-sum log p(label) in nats over the labels of the batch, and their number."""
    hidden = model.model(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids)
    loss_sum = cross_entropy_sum(hidden, model.head_weight, batch.labels)
    return StageOutput(loss_sum, (batch.labels != IGNORE_INDEX).sum(), {})


@dataclass(frozen=True)
class Pretrain(Stage):
    """Mean cross-entropy over the tokens of the global batch."""

    reduction: Reduction = "mean"

    def step(self, model: BitNetForCausalLM, batch: TokenBatch) -> StageOutput:
        """See `next_token_step`."""
        return next_token_step(model, batch)
