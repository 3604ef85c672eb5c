"""Causal attention within documents on CUDA: torch's FlashAttention over documents of any length, end to end.

No mask is made, and the work is that of the documents, not of the rows that hold them (Dao, FlashAttention-2, arXiv
2307.08691). Its backward pass adds in any order, unless `torch.use_deterministic_algorithms` (the Trainer's
`deterministic`) asks for one.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import is_flash_attention_available
from torch.nn.attention.varlen import varlen_attn

from bitnet_train.autocast import compute_dtype
from bitnet_train.kernels.gpu import capable

DEVICE = "cuda"
# torch 2.11 takes fewer heads of keys as they are, later releases ask for a word.
_GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
LARGEST_HEAD = 192  # features, a multiple of 8: what the backward pass takes on every device


def available(device: torch.device) -> bool:
    """Whether `varlen_attention` can work on this device; asked for outside of compiled graphs."""
    on_cuda = device.type == "cuda"
    return device.type == DEVICE and capable(device) and not (on_cuda and not is_flash_attention_available())


def fits(dim: int, dtype: torch.dtype) -> bool:
    """Whether it can work on heads of this size and dtype."""
    return dim % 8 == 0 and dim <= LARGEST_HEAD and dtype in (torch.bfloat16, torch.float16)


def is_for(h: Tensor, head_dim: int) -> bool:
    """Whether layers that read a stream `(batch, seq, hidden)` can attend in this way."""
    return h.numel() > 0 and available(h.device) and fits(head_dim, compute_dtype(h))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """Attention of queries to the keys of their document, up to themselves.

    Args:
        q: `(batch, heads, seq, head_dim)`, bfloat16 or float16.
        k: `(batch, kv_heads, seq, head_dim)`; each of its heads serves heads / kv_heads heads of q.
        v: as k.
        boundaries: int32 `(documents + 1,)`: where each document begins in the rows laid end to end, and their end.
        longest: tokens of the longest document.

    Returns:
        `(batch, heads, seq, head_dim)`, laid out as `(batch, seq, heads, head_dim)`.
    """
    batch, heads, seq, dim = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    attended = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0), **_GROUPED)
    assert isinstance(attended, Tensor)
    return attended.view(batch, seq, heads, dim).transpose(1, 2)
