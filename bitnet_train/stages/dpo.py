"""Direct preference optimisation: chosen above rejected, relative to the model that training started from.

    loss = -log sigmoid(beta ((log pi_c - log ref_c) - (log pi_r - log ref_r)))

with log pi the sum of the completion's token log-probabilities (Rafailov et al., arXiv 2305.18290, equation 7). The
reference never sits in memory during training: its log-probabilities are computed once, before the first step, and
travel with the pairs.
"""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.data.batches import PairBatch, TokenBatch
from bitnet_train.data.packing import PairRows
from bitnet_train.errors import UserError
from bitnet_train.losses.preference import dpo_sigmoid_sum
from bitnet_train.losses.tokens import token_logps
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Reduction, Stage, StageOutput


def completion_logps(model: BitNetForCausalLM, batch: PairBatch) -> Tensor:
    """Log-probability of every completion, float32 `(2, pairs)`: the chosen ones, then the rejected ones."""
    tokens = batch.tokens
    hidden = model.model(tokens.input_ids, position_ids=tokens.position_ids, document_ids=tokens.document_ids)
    return token_logps(hidden, model.head_weight, tokens.labels).sum(dim=-1).view(2, -1)


@dataclass(frozen=True)
class DirectPreference(Stage):
    """The sigmoid loss of DPO, averaged over the pairs of the global batch; metric names are TRL's."""

    beta: float = 0.1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise UserError(f"stage.beta must be above 0, got {self.beta}")

    def prepare(
        self,
        model: BitNetForCausalLM,
        rows: Mapping[str, PairRows],
        cache_dir: Path,
        precision: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Gives every pair the initial model's log-probabilities; cached by weights and pairs."""
        weights = _model_hash(model, precision)
        for pairs in rows.values():
            file = cache_dir / f"reference-{weights[:16]}-{pairs.fingerprint[:16]}.safetensors"
            if not file.exists():
                with precision():
                    _write_atomically({"logps": reference_logps(model, pairs)}, file)
            pairs.reference_logps = load_file(file)["logps"]

    def step(self, model: BitNetForCausalLM, batch: PairBatch) -> StageOutput:
        """Sums over the pairs of a batch that carries its reference log-probabilities."""
        logps = completion_logps(model, batch)
        chosen, rejected = logps - batch.reference_logps
        loss_sum = dpo_sigmoid_sum(chosen, rejected, self.beta)
        rewards = self.beta * (logps.detach() - batch.reference_logps)
        return StageOutput(loss_sum, torch.tensor(logps.shape[1], device=logps.device), _metrics(rewards, logps))


@torch.no_grad()
def reference_logps(model: BitNetForCausalLM, pairs: PairRows, batch_size: int = 8) -> Tensor:
    """Log-probabilities of all completions under the model, without dropout: float32 `(2, len(pairs))`, in nats."""
    device, was_training = model.head_weight.device, model.training
    model.eval()
    logps = torch.empty(2, len(pairs))
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen.ids) + len(pairs[i].rejected.ids))
    for start in range(0, len(pairs), batch_size):
        chosen_ones = by_length[start : start + batch_size]
        batch = pairs.collate([pairs[i] for i in chosen_ones])
        tokens = TokenBatch(*(field.to(device) for field in batch.tokens))
        logps[:, chosen_ones] = completion_logps(model, PairBatch(tokens, batch.reference_logps)).cpu()
    model.train(was_training)
    return logps


def _model_hash(model: BitNetForCausalLM, precision: Callable[[], AbstractContextManager[None]]) -> str:
    """Of all that decides about a log-probability: shape, weights, and whether products run in bfloat16."""
    with precision():
        autocast = torch.is_autocast_enabled(model.head_weight.device.type)
    digest = hashlib.sha256(f"{model.config} {autocast}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_atomically(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    save_file(tensors, temporary)
    temporary.replace(file)


def _metrics(rewards: Tensor, logps: Tensor) -> dict[str, Tensor]:
    chosen, rejected = rewards
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
        "logps/accuracies": (logps[0] > logps[1]).float().sum(),
        "logps/chosen": logps[0].detach().sum(),
        "logps/rejected": logps[1].detach().sum(),
    }
