"""Parameter groups and optimizers. Learning rate and weight decay come from the schedule, step by step.

    adamw       torch.optim.AdamW, fused                     16 bytes per parameter with the float32 master
    adamw_8bit  bitsandbytes, moments in blocks of int8      10
    muon        torch.optim.Muon for the matrices inside the decoder, AdamW for the rest                 12 to 16
    another     any torch optimizer, by `_target_` (`ByTarget`)

Every parameter group carries `decays`, by which `set_hyperparameters` gives it this step's weight decay or none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from bitnet_train.classes import class_named
from bitnet_train.errors import UserError

NamedParameter: TypeAlias = tuple[str, nn.Parameter]
Group: TypeAlias = dict[str, Any]

NO_DECAY = ("*norm.weight", "*.bias")
NOT_IN_MUON = ("*embed_tokens.weight", "*lm_head.weight")
MUON_RATES = ("match_rms_adamw", "original")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parameter_groups(parameters: Iterable[NamedParameter], no_decay: Sequence[str]) -> list[Group]:
    """Two groups: what decays, and what does not because its name matches a pattern of `no_decay`."""
    groups: list[Group] = [{"params": [], "decays": True}, {"params": [], "decays": False}]
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[_matches(name, no_decay)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def set_hyperparameters(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Gives every group this step's learning rate, and the decaying groups this step's weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ABC):
    """What every optimizer is configured by.

    Attributes:
        grad_clip: largest global norm of the gradient; 0 switches clipping off.
        grad_clip_per_token: multiplies the limit of a summed gradient by its number of trained tokens (or pairs), so
            that it means the same as for a mean.
        no_decay: patterns (`*`, `?`) of the names of parameters without weight decay; [], as the released 2B4T: none.
        moment_bytes: what the optimizer keeps of a parameter, at most.
    """

    moment_bytes: ClassVar[float] = 8.0

    grad_clip: float
    grad_clip_per_token: bool = False
    no_decay: list[str] = field(default_factory=lambda: list(NO_DECAY))

    def __post_init__(self) -> None:
        if not self.grad_clip >= 0.0:
            raise UserError(f"optimizer.grad_clip must be at least 0 (0: no clipping), got {self.grad_clip}")

    @abstractmethod
    def build(self, parameters: Iterable[NamedParameter]) -> Optimizer:
        """The optimizer; its learning rate and weight decay are placeholders that the first step overwrites."""


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """torch.optim.AdamW, fused (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        betas: decay of AdamW's two moments.
        eps: added to the root of AdamW's second moment.
    """

    betas: tuple[float, float]
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas must lie in [0, 1) and be two, got {self.betas}")
        if not self.eps > 0.0:
            raise UserError(f"optimizer.eps must be above 0, got {self.eps}")

    def build(self, parameters: Iterable[NamedParameter]) -> Optimizer:
        """See `OptimizerConfig.build`."""
        return self._adamw(parameter_groups(parameters, self.no_decay))

    def _adamw(self, groups: list[Group]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=True)


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AdamW):
    """bitsandbytes' AdamW with both moments in int8, one scale per 256 values (Dettmers et al., arXiv 2110.02861).

    Attributes:
        min_8bit_size: parameters of fewer values, norm gains above all, keep float32 moments.
    """

    moment_bytes: ClassVar[float] = 2.0

    min_8bit_size: int = 4096

    def _adamw(self, groups: list[Group]) -> Optimizer:
        from bitsandbytes.optim.adamw import AdamW8bit as Bitsandbytes

        optimizer: Optimizer = Bitsandbytes(  # type: ignore[no-untyped-call]
            groups, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, min_8bit_size=self.min_8bit_size
        )
        return optimizer


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """torch.optim.Muon for the matrices inside the decoder, AdamW for embedding, head, norms and biases.

    Attributes:
        momentum: of the gradient, before it is orthogonalised.
        adjust_lr_fn: match_rms_adamw (lr 0.2 sqrt(max(out, in)): rate and decay of AdamW carry over; Liu et al., arXiv
            2502.16982, section 2.2) or original (lr sqrt(max(1, out / in)); Jordan et al. 2024).
        adamw: patterns of the names of matrices that AdamW takes.
    """

    momentum: float = 0.95
    adjust_lr_fn: str = MUON_RATES[0]
    adamw: list[str] = field(default_factory=lambda: list(NOT_IN_MUON))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"optimizer.momentum must lie in [0, 1), got {self.momentum}")
        if self.adjust_lr_fn not in MUON_RATES:
            raise UserError(f"optimizer.adjust_lr_fn must be one of {', '.join(MUON_RATES)}, got {self.adjust_lr_fn!r}")

    def build(self, parameters: Iterable[NamedParameter]) -> Optimizer:
        """See `OptimizerConfig.build`.

        Raises:
            UserError: the patterns of `adamw` leave nothing to Muon.
        """
        named = list(parameters)
        is_muon = {name: p.ndim == 2 and not _matches(name, self.adamw) for name, p in named}
        muon, others = (
            parameter_groups([(name, p) for name, p in named if is_muon[name] is takes], self.no_decay)
            for takes in (True, False)
        )
        if not muon:
            raise UserError(f"optimizer.adamw={self.adamw} leaves no matrix to Muon; name fewer, or use adamw")
        first = torch.optim.Muon(muon, lr=0.0, weight_decay=0.0, momentum=self.momentum, adjust_lr_fn=self.adjust_lr_fn)
        return Together(first, self._adamw(others)) if others else first


class Together(Optimizer):
    """Several optimizers that step as one; their parameter groups are the groups of this one."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each; the closure, which computes the gradients, runs once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of every part, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()


@dataclass(frozen=True, kw_only=True)
class ByTarget(OptimizerConfig):
    """Any optimizer of torch's interface, by the path of its class.

    Attributes:
        target: module and class, such as torch.optim.NAdam.
        options: its arguments beside the parameters, the learning rate and the weight decay.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, parameters: Iterable[NamedParameter]) -> Optimizer:
        """See `OptimizerConfig.build`.

        Raises:
            UserError: there is no such class, or it refuses an option.
        """
        groups = parameter_groups(parameters, self.no_decay)
        cls: Callable[..., object] = class_named(self.target, "optimizer._target_", (Optimizer,))
        try:
            optimizer = cls(groups, lr=0.0, **self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer._target_={self.target} refuses its options {self.options}: {error}") from error
        assert isinstance(optimizer, Optimizer)
        return optimizer
