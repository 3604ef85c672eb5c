"""Rotary positions: a pair of features (x_i, x_{i + d/2}) turns by the angle position * f_i, with f_i = theta^(-2i/d).

Su et al., RoFormer (arXiv 2104.09864, section 3.2.2), in the half-split (NEOX) order of transformers and GGUF.

For contexts longer than L, the one a model was trained with, pairs turn more slowly (`RopeScaling`):

    f_i <- f_i (k_i + (1 - k_i) / factor)        k_i in [0, 1]: the share of the trained frequency that is kept

    linear   k_i = 0                                                              (Chen et al., arXiv 2306.15595)
    llama3   k_i = clamp((L f_i / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    yarn     k_i = 1 - clamp((i - a) / (b - a), 0, 1), and cos and sin times m    (Peng et al., arXiv 2309.00071)

L f_i / 2 pi is the number of turns of a pair within L; a and b are the i at which it is beta_fast and beta_slow, and
m = 0.1 ln(factor) + 1 makes up for attention that spreads over more positions. Source of llama3: Meta's llama-models,
`apply_scaling`. Names and defaults are those of transformers' `rope_parameters` and of the older `rope_scaling`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bitnet_train.errors import UserError
from bitnet_train.kernels import gpu, native

# Field names of each type beside rope_type and factor: those that must be set, those that may be.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")  # of yarn
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # turns; YaRN, section 3.2
_LEAST_TURNS = 1e-6
_NO_WIDTH = 0.001  # transformers' width of a ramp whose ends meet


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a model are stretched; None is "not set" (see the module's formulas).

    Attributes:
        rope_type: linear, llama3 or yarn.
        factor: how many times longer the context becomes, at least 1.
        original_max_position_embeddings: L, positions; llama3 and yarn need it.
        low_freq_factor: llama3: turns within L below which a pair is stretched in full.
        high_freq_factor: llama3: turns within L above which a pair is kept.
        attention_factor: yarn: m in place of the formula.
        beta_fast: yarn: turns within L above which a pair is kept, 32 where it is not set.
        beta_slow: yarn: turns within L below which a pair is stretched in full, 1 where it is not set.
        mscale: yarn, with mscale_all_dim: m = (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
        mscale_all_dim: yarn, see mscale.
        truncate: yarn: a and b are whole numbers, which they are where it is not set.

    Raises:
        UserError: the type is unknown, or a field is missing, out of range or of another type.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in _REQUIRED:
            raise UserError(
                f"rope_scaling.rope_type must be one of {', '.join(_REQUIRED)} (null: none), got {self.rope_type!r}"
            )
        self._check_fields()
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not 0.0 < low < high:
            raise UserError(f"rope_scaling.low_freq_factor must lie between 0 and high_freq_factor ({high}), got {low}")
        if not self._fast > self._slow > 0.0:
            raise UserError(f"rope_scaling.beta_fast must be above beta_slow ({self._slow}), got {self._fast}")
        if not self._slow > _LEAST_TURNS:
            raise UserError(f"rope_scaling.beta_slow must be above {_LEAST_TURNS}, got {self._slow}")
        for name in ("mscale", "mscale_all_dim"):
            if (getattr(self, name) or 0.0) < 0.0:
                raise UserError(f"rope_scaling.{name} must not be negative, got {getattr(self, name)}")

    def _check_fields(self) -> None:
        required = _REQUIRED[self.rope_type]
        allowed = {"rope_type", "factor", *required, *(_OPTIONAL if self.rope_type == "yarn" else ())}
        for name, value in vars(self).items():
            if value is None and name in required:
                raise UserError(f"rope_scaling.{name} must be set for rope_type {self.rope_type}")
            if value is not None and name not in allowed:
                raise UserError(
                    f"rope_scaling.{name} is no field of rope_type {self.rope_type}, got {value}; leave it out"
                )
        if not self.factor >= 1.0:
            raise UserError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        for name in ("original_max_position_embeddings", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"rope_scaling.{name} must be above 0, got {value}")

    @property
    def _trained_turns(self) -> float:
        """Turns within L of a pair whose frequency is 1."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings / (2.0 * math.pi)

    @property
    def _fast(self) -> float:
        return self.beta_fast or _BETA_FAST

    @property
    def _slow(self) -> float:
        return self.beta_slow or _BETA_SLOW

    @property
    def magnitude(self) -> float:
        """m, by which cos and sin are multiplied; 1 but for yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (growth * self.mscale + 1.0) / (growth * self.mscale_all_dim + 1.0)
        return growth + 1.0

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """The frequencies of the long context, float32 `(head_dim / 2,)`, from those of the trained one."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        by_turns = self.rope_type == "llama3"
        kept = self._kept_by_turns(frequencies) if by_turns else self._kept_by_index(frequencies, theta)
        return frequencies * (kept + (1.0 - kept) / self.factor)

    def _kept_by_turns(self, frequencies: Tensor) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        assert low is not None
        assert high is not None
        return ((frequencies * self._trained_turns - low) / (high - low)).clamp(0.0, 1.0)

    def _kept_by_index(self, frequencies: Tensor, theta: float) -> Tensor:
        head_dim = 2 * len(frequencies)
        first, last = self._index(self._fast, head_dim, theta), self._index(self._slow, head_dim, theta)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        indices = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
        return 1.0 - ((indices - first) / ((last - first) or _NO_WIDTH)).clamp(0.0, 1.0)

    def _index(self, turns: float, head_dim: int, theta: float) -> float:
        """The i, not rounded, of the pair that makes this many turns within L: theta^(-2i/d) L / 2 pi = turns."""
        return head_dim * math.log(self._trained_turns / turns) / (2.0 * math.log(theta))


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 `(batch, 1, seq, head_dim)`; the axis of one is that of the heads."""

    cos: Tensor
    sin: Tensor


def rotation(position_ids: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """The rotation at integer positions `(batch, seq)`."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta)
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


class _Rotate(Function):
    """`rotate` in one pass of C++ or Triton; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_outputs[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return native.rotate(x, cos, sin, sign) if native.available(x) else gpu.rotate(x, cos, sin, sign)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turns queries or keys `(batch, heads, seq, head_dim)`; float32 inside, the dtype of x outside."""
    if native.available(x, *by) or gpu.available(x, *by):
        turned: Tensor = _Rotate.apply(x, by.cos, by.sin)  # type: ignore[no-untyped-call]
        return turned
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * by.cos + turned * by.sin).to(x.dtype)
