"""Supervised fine-tuning: the answers of conversations, with BitNet's summed loss.

The 2B4T report (arXiv 2504.12285, section 3.2) sums the cross-entropy over the tokens of a batch instead of averaging
it and raises the learning rate. The sum runs over the global batch, so that a token weighs the same however rows,
micro-batches and ranks divide it.
"""

from dataclasses import dataclass

from bitnet_train.data.batches import TokenBatch
from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Reduction, Stage, StageOutput
from bitnet_train.stages.pretrain import next_token_step


@dataclass(frozen=True)
class SupervisedFineTuning(Stage):
    """Cross-entropy over the trained tokens; `reduction` is "sum" (2B4T) or "mean"."""

    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean"):
            raise UserError(f"stage.reduction must be 'sum' or 'mean', got {self.reduction!r}")

    def step(self, model: BitNetForCausalLM, batch: TokenBatch) -> StageOutput:
        """Labels are set on the tokens of answers and their end-of-turn token alone."""
        return next_token_step(model, batch)
