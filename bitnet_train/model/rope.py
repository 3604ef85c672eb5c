"""Rotary positions: a pair of features (x_i, x_{i + d/2}) turns by the angle position * theta^(-2i/d).

Su et al., RoFormer (arXiv 2104.09864, section 3.2.2), in the half-split (NEOX) order of transformers and GGUF.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 `(batch, 1, seq, head_dim)`; the axis of one is that of the heads."""

    cos: Tensor
    sin: Tensor


def rotation(position_ids: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotation at integer positions `(batch, seq)`."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turns queries or keys `(batch, heads, seq, head_dim)`; float32 inside, the dtype of x outside."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * by.cos + turned * by.sin).to(x.dtype)
