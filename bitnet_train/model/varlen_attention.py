"""Causal attention within documents on CUDA: torch's FlashAttention over documents of any length, end to end.

No mask is made, and the work is that of the documents, not of the rows that hold them (Dao, FlashAttention-2, arXiv
2307.08691). Its backward pass adds in any order, unless `torch.use_deterministic_algorithms` (the Trainer's
`deterministic`) asks for one.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bitnet_train.kernels.gpu import capable
from bitnet_train.kernels.tensors import ordinary

DEVICE = "cuda"
LARGEST_HEAD = 192  # features, a multiple of 8: what the backward pass takes on every device


def available(q: Tensor) -> bool:
    """Whether `varlen_attention` can work on queries like these."""
    dim = q.shape[-1]
    fits = dim % 8 == 0 and dim <= LARGEST_HEAD and ordinary((q,), DEVICE, (torch.bfloat16, torch.float16))
    return fits and capable(q.device) and (not q.is_cuda or torch.backends.cuda.is_flash_attention_available())


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
    q, *kv = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2).flatten(0, 1) for x in kv)
    attended = varlen_attn(q.flatten(0, 1), k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0))
    assert isinstance(attended, Tensor)
    return attended.view(batch, seq, heads, dim).transpose(1, 2)
