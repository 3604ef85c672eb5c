"""Parameter groups and optimizers. Learning rate and weight decay come from the schedule, step by step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from bitnet_train.errors import UserError

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class OptimizerConfig(Protocol):
    """What the training module asks of an optimizer's configuration."""

    grad_clip: float
    """Largest global norm of the gradient; 0 switches clipping off."""

    def build(self, parameters: NamedParameters) -> Optimizer:
        """The optimizer over two groups, decayed and not (`parameter_groups`)."""
        ...


def parameter_groups(parameters: NamedParameters, decay_norms: bool) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norm gains and biases do where `decay_norms` says so (2B4T decayed its gains).

    Each group carries `decays`, by which the training module sets its weight decay.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for _, parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 or decay_norms else kept).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "decays": True}, {"params": kept, "decays": False}]
    return [group for group in groups if group["params"]]


def set_hyperparameters(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Gives every group this step's learning rate, and the decaying groups this step's weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW, fused (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101)."""

    betas: tuple[float, float]
    eps: float
    decay_norms: bool
    grad_clip: float

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas must lie in [0, 1) and be two, got {self.betas}")
        if not self.eps > 0.0:
            raise UserError(f"optimizer.eps must be above 0, got {self.eps}")
        if not self.grad_clip >= 0.0:
            raise UserError(f"optimizer.grad_clip must be at least 0 (0: no clipping), got {self.grad_clip}")

    def build(self, parameters: NamedParameters) -> Optimizer:
        """The optimizer; lr and weight decay are placeholders that the first step overwrites."""
        groups = parameter_groups(parameters, self.decay_norms)
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=True)
