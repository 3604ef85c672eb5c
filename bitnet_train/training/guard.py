"""No update from a step whose loss or gradient is not finite; what the step was made of is named.

The norm and the loss are those of the whole global batch, the same on every rank: all ranks decide the same. The
weights are still those of the step before, and the newest checkpoint stays what it is.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_train.data.order import MicroBatches
from bitnet_train.errors import RunFailed
from bitnet_train.training import ranks

log = logging.getLogger(__name__)

_NAMED = 3  # micro-batches in a message
_SAMPLES = 16  # samples of each


class StepGuard:
    """Decides whether a step may be made.

    Args:
        limit: steps in a row that may be left out; one more ends the run.

    Attributes:
        skipped: how many were left out, in a row and over the run; part of a checkpoint.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.skipped = [0, 0]
        self._losses: list[Tensor] = []

    def saw(self, loss: Tensor) -> None:
        """Keeps the loss of a micro-batch, shape (), on its device until the step is decided."""
        self._losses.append(loss.detach())

    def passes(self, step: int, norm: float, loss: float, order: MicroBatches) -> bool:
        """Whether the update may be made. All ranks call it together.

        Args:
            step: the optimizer step.
            norm: of the gradient of the global batch.
            loss: of the global batch.
            order: says which samples this rank has read.

        Raises:
            RunFailed: it may not, and neither may it be left out.
        """
        losses, self._losses = self._losses, []
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped[0] = 0
            return True
        message = f"step {step}: {_culprits(losses, order, step, norm)}; the update was not made"
        if self.skipped[0] >= self.limit:
            raise RunFailed(
                f"{message}. Lower schedule.peak_lr, lengthen schedule.warmup_steps, look at these samples, or leave "
                "such steps out: skip_nonfinite=N. Started again, it goes on from the newest checkpoint"
            )
        self.skipped = [value + 1 for value in self.skipped]
        log.warning("%s, %d of at most %d in a row", message, self.skipped[0], self.limit)
        return False


def _culprits(losses: Sequence[Tensor], order: MicroBatches, step: int, norm: float) -> str:
    """The micro-batches of all ranks whose loss is not finite; where only the gradient is not, the whole step."""
    values = torch.stack(list(losses)).tolist() if losses else []
    own = [
        f"the loss of rank {order.rank}, micro-batch {number} is {value} "
        f"(samples {_some(order.micro_batch(step, number))})"
        for number, value in enumerate(values)
        if not math.isfinite(value)
    ]
    found = [text for texts in ranks.gather(own) for text in texts]
    if not found:
        return f"the gradient's norm is {norm}, every loss is finite (samples {_some(order.samples(step))})"
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _some(samples: Sequence[int]) -> str:
    more = f" and {len(samples) - _SAMPLES} more" if len(samples) > _SAMPLES else ""
    return ", ".join(map(str, samples[:_SAMPLES])) + more
