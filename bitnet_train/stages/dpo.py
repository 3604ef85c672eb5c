"""Preference optimisation: chosen above rejected, relative to the model that training started from.

    loss = -log sigmoid(beta ((log pi_c - log ref_c) - (log pi_r - log ref_r)))

with log pi the sum of the completion's token log-probabilities (Rafailov et al., arXiv 2305.18290, equation 7), or
another loss of `losses.preference`. The reference never sits in memory during training: its log-probabilities are
computed once, before the first step, and travel with the pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.data.batches import PairBatch
from bitnet_train.data.packing import PairRows
from bitnet_train.errors import UserError
from bitnet_train.losses.preference import WITH_REFERENCE, WITHOUT_REFERENCE, LossOptions, PairScores, sft_term
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import ALONE, Mean, Ranks, Reduction, Stage, StageOutput
from bitnet_train.stages.reference import (
    Precision,
    cached_reference_logps,
    completion_lengths,
    completion_logps,
    model_hash,
)

REFERENCES = {"initial": WITH_REFERENCE, "none": WITHOUT_REFERENCE}


@dataclass(frozen=True)
class DirectPreference(Stage):
    """A loss over pairs, averaged over the pairs of the global batch; options and metrics have TRL's names.

    Attributes:
        loss_type: sigmoid, robust, hinge, ipo, apo_zero, apo_down or sigmoid_norm; without a reference simpo or orpo.
            `losses.preference` has the formulas.
        reference: initial, the model that training starts from, or none, for simpo and orpo.
        beta: strength of the pull towards the reference; of orpo, weight of the odds ratio.
        label_smoothing: share of pairs assumed to be labelled the wrong way round.
        simpo_gamma: the margin that simpo wants between the two scores.
        rpo_alpha: weight of an SFT term, the chosen completion's negative log-likelihood per token; 0 adds none.
    """

    loss_type: str = "sigmoid"
    reference: str = "initial"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    rpo_alpha: float = 0.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0.0:
            raise UserError(f"stage.beta must be above 0, got {self.beta}")
        if self.reference not in REFERENCES:
            raise UserError(f"stage.reference must be {' or '.join(REFERENCES)}, got {self.reference!r}")
        if self.loss_type not in REFERENCES[self.reference]:
            losses = ", ".join(REFERENCES[self.reference])
            raise UserError(
                f"stage.loss_type must be one of {losses} with stage.reference={self.reference}, got {self.loss_type!r}"
            )
        if not 0.0 <= self.label_smoothing < 0.5:
            raise UserError(f"stage.label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if not (self.rpo_alpha >= 0.0 and self.simpo_gamma >= 0.0):
            raise UserError(
                f"stage.rpo_alpha and stage.simpo_gamma must be at least 0, got {self.rpo_alpha}, {self.simpo_gamma}"
            )

    def prepare(
        self,
        model: BitNetForCausalLM,
        rows: Mapping[str, PairRows],
        cache_dir: Path,
        precision: Precision,
        ranks: Ranks = ALONE,
    ) -> None:
        """Gives every pair the initial model's log-probabilities; see `stages.reference`."""
        if self.reference == "initial":
            weights = model_hash(model, precision, ranks)
            for pairs in rows.values():
                pairs.reference_logps = cached_reference_logps(model, weights, pairs, cache_dir, precision, ranks)

    def step(self, model: BitNetForCausalLM, batch: PairBatch) -> StageOutput:
        """Sums over the pairs of a batch that carries its reference log-probabilities."""
        logps, lengths = completion_logps(model, batch.tokens), completion_lengths(batch.tokens)
        policy = PairScores(*logps, *lengths)
        reference = batch.reference_logps if self.reference == "initial" else torch.zeros_like(logps)
        losses = self.losses(policy, reference)
        count = torch.tensor(len(losses), device=losses.device)
        metrics = {name: Mean(value.sum(), count) for name, value in self.metrics(policy, reference).items()}
        return StageOutput(losses.sum(), count, metrics)

    def losses(self, policy: PairScores, reference: Tensor) -> Tensor:
        """The loss of every pair, `(pairs,)`, of the policy's log-probabilities and the reference's `(2, pairs)`."""
        loss = REFERENCES[self.reference][self.loss_type]
        scores = policy.relative_to(reference)
        losses = loss(scores, LossOptions(self.beta, self.label_smoothing, self.simpo_gamma))
        return losses + self.rpo_alpha * sft_term(policy) if self.rpo_alpha else losses

    @torch.no_grad()
    def metrics(self, policy: PairScores, reference: Tensor) -> dict[str, Tensor]:
        """TRL's metrics of every pair; without a reference they are of means per token, as in its CPO and ORPO."""
        policy = policy if self.reference == "initial" else policy.per_token()
        scores = policy.relative_to(reference)
        chosen, rejected = self.beta * scores.chosen, self.beta * scores.rejected
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "logps/accuracies": (policy.chosen > policy.rejected).float(),
        }
