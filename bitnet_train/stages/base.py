"""What a stage gives the training module, and what it may prepare before the first step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM

Reduction = str  # "mean" or "sum"
REDUCTIONS = ("mean", "sum")


class Mean(NamedTuple):
    """A figure that is logged as total / weight, each summed over all micro-batches and ranks; both have shape ()."""

    total: Tensor
    weight: Tensor


@dataclass(frozen=True)
class StageOutput:
    """Sums over one micro-batch. The module adds them up over micro-batches and ranks and divides by the whole count.

    `loss_sum` carries the gradient; it and `count` (trained tokens, or pairs) have shape ().
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, Mean] = field(default_factory=dict)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _called(function: Callable[[], Tensor]) -> Tensor:
    return function()


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, as far as a stage deals with them; unless told otherwise, a single one.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
        sum: a tensor to its sum over all ranks.
        whole: a weight, of which every rank may hold a part, to all of it.
        gathered: calls a function that runs the decoder. All ranks call it together, and equally often.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = _unchanged
    whole: Callable[[Tensor], Tensor] = _unchanged
    gathered: Callable[[Callable[[], Tensor]], Tensor] = _called


ALONE = Ranks()


class Stage(ABC):
    """A training objective. The logged loss is loss_sum / count, whatever the reduction.

    Attributes:
        reduction: what the gradient of an optimizer step is: "mean", the gradient of loss_sum / count over the global
            batch, or "sum", of loss_sum itself.
    """

    reduction: Reduction

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise UserError(f"stage.reduction must be {' or '.join(REDUCTIONS)}, got {self.reduction!r}")

    @abstractmethod
    def step(self, model: BitNetForCausalLM, batch: Any) -> StageOutput:
        """The sums of one micro-batch, with gradients."""

    def prepare(  # noqa: B027  (most stages prepare nothing)
        self,
        model: BitNetForCausalLM,
        rows: Mapping[str, Any],
        cache_dir: Path,
        precision: Callable[[], AbstractContextManager[None]],
        ranks: Ranks = ALONE,
    ) -> None:
        """Called once with the initial model and the named row sets (train and validation), before the first step.

        Args:
            model: the model that training starts from, on its device.
            rows: what the data module reads, by name.
            cache_dir: where results that outlive the run may be kept.
            precision: makes the context in which the training step runs the model (autocast).
            ranks: who else prepares.
        """
