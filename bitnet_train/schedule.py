"""Learning rate and weight decay as pure functions of the step: nothing to save, nothing to restore.

Every shape warms up linearly over W steps, P t / W, and then follows a curve of x = (t - W) / (T - W) from the peak P:

    two_stage_linear  P + (end - P) x, with P = P1 for t < T/2 and P2 from there on. Weight decay is constant, then 0.
                      (Training Tips, Code and FAQ, figure of the schedules.)
    two_stage_cosine  end + (P - end)(1 + cos(pi x)) / 2, with P1 and P2 likewise. Weight decay rises to its peak along
                      a cosine in stage 1 and is 0 in stage 2. (2B4T report, arXiv 2504.12285, section 3.1.)
    cosine            the same curve with one peak
    wsd               P, and over the last share of the run P + (end - P) y or P + (end - P) sqrt(y), y from 0 to 1
                      (MiniCPM, arXiv 2404.06395, section 4; the root: Hagele et al., arXiv 2405.18392)
    constant          P

The two stages are BitNet's own: at T/2 the learning rate falls at once to a lower curve and weight decay ends. Both
curves run over the whole of T: the second stage joins its curve in the middle, without a second warm-up.

A warm-up may be given in tokens, which makes the whole schedule a function of the tokens: `in_steps` turns it into
steps once the tokens of a step are known.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

from bitnet_train.errors import UserError

DECAYS = ("linear", "sqrt")


class Schedule(Protocol):
    """Maps a step t, counted from 0, of `total` steps to the values that the update of this step uses."""

    def in_steps(self, tokens_per_step: int) -> Self:
        """The same schedule with nothing counted in tokens."""
        ...

    def lr(self, step: int, total: int) -> float:
        """Learning rate of the update `step`."""
        ...

    def weight_decay(self, step: int, total: int) -> float:
        """Weight decay of the update `step`."""
        ...


@dataclass(frozen=True, kw_only=True)
class _WarmUp(ABC):
    """What all shapes share.

    Attributes:
        peak_lr: learning rate at the end of the warm-up.
        warmup_steps: optimizer steps from 0 to the peak.
        warmup_tokens: the same in tokens, in place of warmup_steps.
        peak_weight_decay: the largest weight decay; constant unless a shape says otherwise.
    """

    peak_lr: float
    warmup_steps: int
    peak_weight_decay: float
    warmup_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"schedule.{field.name} must be a finite number of at least 0, got {value}")

    def in_steps(self, tokens_per_step: int) -> Self:
        """The warm-up in whole steps, rounded up."""
        if self.warmup_tokens is None:
            return self
        return replace(self, warmup_steps=-(-self.warmup_tokens // tokens_per_step), warmup_tokens=None)

    def lr(self, step: int, total: int) -> float:
        """Learning rate of the update `step`."""
        assert self.warmup_tokens is None, "in_steps comes first"
        peak = self._peak(step, total)
        if step < self.warmup_steps:
            return peak * step / self.warmup_steps
        return self._curve(peak, (step - self.warmup_steps) / max(1, total - self.warmup_steps))

    def weight_decay(self, step: int, total: int) -> float:
        """The same at every step."""
        return self.peak_weight_decay

    def _peak(self, step: int, total: int) -> float:
        return self.peak_lr

    @abstractmethod
    def _curve(self, peak: float, x: float) -> float:
        """What follows the warm-up; x runs from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Constant(_WarmUp):
    """The peak to the end."""

    def _curve(self, peak: float, x: float) -> float:
        return peak


@dataclass(frozen=True, kw_only=True)
class _Falling(_WarmUp):
    """What ends below its peak.

    Attributes:
        end_lr: learning rate at the last step.
    """

    end_lr: float


def _linear(start: float, end: float, x: float) -> float:
    return start + (end - start) * x


def _cosine(start: float, end: float, x: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(x, 1.0))) / 2


@dataclass(frozen=True, kw_only=True)
class Cosine(_Falling):
    """One cosine; see the module's text."""

    def _curve(self, peak: float, x: float) -> float:
        return _cosine(peak, self.end_lr, x)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(_Falling):
    """Warm-up, peak, and a decay.

    Attributes:
        decay_share: share of what follows the warm-up over which the rate decays, in (0, 1].
        decay: linear or sqrt, the curve of the decay.
    """

    decay_share: float
    decay: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.decay_share <= 1.0:
            raise UserError(f"schedule.decay_share must lie in (0, 1], got {self.decay_share}")
        if self.decay not in DECAYS:
            raise UserError(f"schedule.decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")

    def _curve(self, peak: float, x: float) -> float:
        y = max(0.0, 1 - (1 - x) / self.decay_share)
        return _linear(peak, self.end_lr, y if self.decay == "linear" else math.sqrt(y))


def _is_first_stage(step: int, total: int) -> bool:
    return 2 * step < total


@dataclass(frozen=True, kw_only=True)
class _TwoStage(_Falling):
    """Two curves with a switch at T/2.

    Attributes:
        second_lr: the peak that the curve of the second stage starts from; None: two thirds of the first (the FAQ).
    """

    second_lr: float | None = None

    def _peak(self, step: int, total: int) -> float:
        if _is_first_stage(step, total):
            return self.peak_lr
        return self.peak_lr * 2 / 3 if self.second_lr is None else self.second_lr


@dataclass(frozen=True, kw_only=True)
class TwoStageLinear(_TwoStage):
    """The FAQ's shape; see the module's text."""

    def _curve(self, peak: float, x: float) -> float:
        return _linear(peak, self.end_lr, x)

    def weight_decay(self, step: int, total: int) -> float:
        """Constant in stage 1, 0 in stage 2."""
        return self.peak_weight_decay if _is_first_stage(step, total) else 0.0


@dataclass(frozen=True, kw_only=True)
class TwoStageCosine(_TwoStage):
    """The 2B4T report's shape; see the module's text."""

    def _curve(self, peak: float, x: float) -> float:
        return _cosine(peak, self.end_lr, x)

    def weight_decay(self, step: int, total: int) -> float:
        """A cosine from 0 to the peak at T/2, then 0."""
        return _cosine(0.0, self.peak_weight_decay, 2 * step / total) if _is_first_stage(step, total) else 0.0
