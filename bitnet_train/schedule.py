"""Learning rate and weight decay as pure functions of the step: nothing to save, nothing to restore.

BitNet trains in two stages: at T/2 the learning rate falls at once to a lower curve and weight decay ends. Two shapes
are published:

    two_stage_linear  P t / W for t < W, then P + (end - P)(t - W)/(T - W); P = P1 for t < T/2, P2 from there on.
                      Weight decay is constant, then 0. (Training Tips, Code and FAQ, figure of the schedules.)
    two_stage_cosine  P1's cosine to `end` over T, from T/2 on P2's; weight decay rises to its peak along a cosine in
                      stage 1 and is 0 in stage 2. (BitNet b1.58 2B4T report, arXiv 2504.12285, section 3.1.)

Both curves of a shape run over the whole of T: the second stage joins its curve in the middle, without a second
warm-up.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from bitnet_train.errors import UserError


class Schedule(Protocol):
    """Maps a step t, counted from 0, of `total` steps to the values that the update of this step uses."""

    def lr(self, step: int, total: int) -> float:
        """Learning rate of the update `step`."""
        ...

    def weight_decay(self, step: int, total: int) -> float:
        """Weight decay of the update `step`."""
        ...


def _check(warmup_steps: int, **rates: float) -> None:
    if warmup_steps < 0:
        raise UserError(f"schedule.warmup_steps must be at least 0, got {warmup_steps}")
    for name, value in rates.items():
        if not (value >= 0.0 and math.isfinite(value)):
            raise UserError(f"schedule.{name} must be a finite number of at least 0, got {value}")


def _progress(step: int, warmup_steps: int, total: int) -> float:
    """(t - W) / (T - W): 0 at the end of the warm-up, 1 at the last step."""
    return (step - warmup_steps) / max(1, total - warmup_steps)


def _linear(peak: float, end: float, x: float) -> float:
    return peak + (end - peak) * x


def _cosine(peak: float, end: float, x: float) -> float:
    return end + (peak - end) * (1 + math.cos(math.pi * min(x, 1.0))) / 2


def _is_first_stage(step: int, total: int) -> bool:
    return 2 * step < total


@dataclass(frozen=True)
class _TwoStage:
    """What both shapes share: warm-up to the peak, and a curve whose peak changes at T/2."""

    peak_lr: float
    second_lr: float
    end_lr: float
    warmup_steps: int
    peak_weight_decay: float

    def __post_init__(self) -> None:
        _check(self.warmup_steps, peak_lr=self.peak_lr, second_lr=self.second_lr, end_lr=self.end_lr)
        _check(self.warmup_steps, peak_weight_decay=self.peak_weight_decay)

    def lr(self, step: int, total: int) -> float:
        """Learning rate of the update `step`."""
        peak = self.peak_lr if _is_first_stage(step, total) else self.second_lr
        if step < self.warmup_steps:
            return peak * step / self.warmup_steps
        return self._curve(peak, self.end_lr, _progress(step, self.warmup_steps, total))

    @staticmethod
    def _curve(peak: float, end: float, x: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class TwoStageLinear(_TwoStage):
    """The FAQ's shape; see the module's text."""

    _curve = staticmethod(_linear)

    def weight_decay(self, step: int, total: int) -> float:
        """Constant in stage 1, 0 in stage 2."""
        return self.peak_weight_decay if _is_first_stage(step, total) else 0.0


@dataclass(frozen=True)
class TwoStageCosine(_TwoStage):
    """The 2B4T report's shape; see the module's text."""

    _curve = staticmethod(_cosine)

    def weight_decay(self, step: int, total: int) -> float:
        """A cosine from 0 to the peak at T/2, then 0."""
        return _cosine(0.0, self.peak_weight_decay, 2 * step / total) if _is_first_stage(step, total) else 0.0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then a cosine from peak_lr to end_lr; constant weight decay."""

    peak_lr: float
    end_lr: float
    warmup_steps: int
    peak_weight_decay: float

    def __post_init__(self) -> None:
        _check(self.warmup_steps, peak_lr=self.peak_lr, end_lr=self.end_lr, peak_weight_decay=self.peak_weight_decay)

    def lr(self, step: int, total: int) -> float:
        """Learning rate of the update `step`."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        return _cosine(self.peak_lr, self.end_lr, _progress(step, self.warmup_steps, total))

    def weight_decay(self, step: int, total: int) -> float:
        """The same at every step."""
        return self.peak_weight_decay
