"""Supervised fine-tuning: the answers of conversations, with BitNet's summed loss.

The 2B4T report (arXiv 2504.12285, section 3.2) sums the cross-entropy over the tokens of a batch instead of averaging
it and raises the learning rate. The sum runs over the global batch, so that a token weighs the same however rows,
micro-batches and ranks divide it. A sum of a hundred thousand tokens has a gradient that many times as long:
`optimizer.grad_clip_per_token` gives it a limit that fits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_train.data.batches import TokenBatch
from bitnet_train.errors import UserError
from bitnet_train.losses.accuracy import correct_tokens
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Mean, Reduction, Stage, StageOutput
from bitnet_train.stages.pretrain import hidden_states, next_token_sums


def add_neftune_noise(inputs_embeds: Tensor, document_ids: Tensor, alpha: float) -> Tensor:
    """x + U(-1, 1) alpha / sqrt(L d) for embeddings `(batch, seq, hidden)`: Jain et al., NEFTune (arXiv 2310.05914).

    L is the length of the document that a token belongs to, so that packing changes nothing; d is the hidden size.
    """
    row = torch.arange(len(document_ids), device=document_ids.device)[:, None]
    _, number, lengths = torch.unique(
        row * (document_ids.max() + 2) + document_ids, return_inverse=True, return_counts=True
    )
    magnitude: Tensor = alpha / (lengths[number] * inputs_embeds.shape[-1]).sqrt()
    noise = torch.empty_like(inputs_embeds).uniform_(-1.0, 1.0)
    return inputs_embeds + magnitude[..., None] * noise


@dataclass(frozen=True)
class SupervisedFineTuning(Stage):
    """Cross-entropy over the trained tokens; `reduction` is "sum" (2B4T) or "mean".

    Attributes:
        neftune_noise_alpha: strength of the noise on the embeddings while training; 0 adds none.
    """

    neftune_noise_alpha: float = 0.0
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.neftune_noise_alpha >= 0.0:
            raise UserError(
                f"stage.neftune_noise_alpha must be at least 0 (0: no noise), got {self.neftune_noise_alpha}"
            )

    def step(self, model: BitNetForCausalLM, batch: TokenBatch) -> StageOutput:
        """Labels are set on the tokens of answers and their end-of-turn token alone.

        At validation also mean_token_accuracy, the share of labels that are the first guess.
        """
        noisy = model.training and self.neftune_noise_alpha > 0.0
        hidden = hidden_states(model, batch, self._noisy_embeds(model, batch) if noisy else None)
        output = next_token_sums(model, batch, hidden)
        if not model.training:
            hits = correct_tokens(hidden, model.head_weight, batch.labels)
            output.metrics["mean_token_accuracy"] = Mean(hits, output.count)
        return output

    def _noisy_embeds(self, model: BitNetForCausalLM, batch: TokenBatch) -> Tensor:
        embeds = model.model.embed_tokens(batch.input_ids)
        return add_neftune_noise(embeds, batch.document_ids, self.neftune_noise_alpha)
