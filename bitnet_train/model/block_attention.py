"""Causal attention within documents, a block of queries at a time: softmax(q k^T / sqrt(d)) v.

A block of queries meets the keys from the start of its first query's document to its own end, so that the work is that
of the documents, not of the rows that hold them, and the heads of a group share one product with their keys. Scores
of one block exist at a time, in the dtype of q; the backward pass makes them again (Dao et al., FlashAttention, arXiv
2205.14135). In bfloat16 they are rounded before the softmax, which torch's attention keeps in float32: with scores
above 50 its gradients are several times closer (`execution.attention=sdpa`).

    p = softmax(q k^T f)        dv = p^T do        ds = p (do v^T - sum(p do v^T)) f        dq = ds k        dk = ds^T q
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bitnet_train.autocast import no_autocast
from bitnet_train.kernels import native
from bitnet_train.kernels.native import Window

QUERIES = 128  # of a block: with their keys' scores, they stay in the second-level cache


def _blocks(starts: Tensor) -> Iterator[tuple[int, slice, slice, Window]]:
    """Row, queries and keys of every block, for `starts` (batch, seq)."""
    for row, firsts in enumerate(starts[:, ::QUERIES].tolist()):
        for block, first in enumerate(firsts):
            begin = block * QUERIES
            end = min(begin + QUERIES, starts.shape[1])
            yield row, slice(begin, end), slice(first, end), Window(starts[row, begin:end], begin, first)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`(heads, queries, head_dim)` to `(kv_heads, groups * queries, head_dim)`: the rows that meet the same keys."""
    return x.reshape(kv_heads, -1, x.shape[-1])


class _BlockAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        batch, heads, seq, dim = q.shape
        kv_heads, factor = k.shape[1], dim**-0.5
        output = q.new_empty(batch, seq, heads, dim).transpose(1, 2)
        lse = []
        for row, queries, keys, window in _blocks(starts):
            p = _grouped(q[row, :, queries], kv_heads) @ k[row, :, keys].transpose(1, 2)
            lse.append(native.softmax_(p, factor, window))
            output[row, :, queries] = (p @ v[row, :, keys]).view(heads, -1, dim)
        ctx.save_for_backward(q, k, v, starts, *lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, starts, *lse = ctx.saved_tensors
        (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
        grad_q = q.new_empty(batch, seq, heads, dim).transpose(1, 2)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        with no_autocast(grad):
            for (row, queries, keys, window), block_lse in zip(_blocks(starts), lse, strict=True):
                rows, grads = (_grouped(x[row, :, queries], kv_heads) for x in (q, grad))
                p = rows @ k[row, :, keys].transpose(1, 2)
                grad_s = grads @ v[row, :, keys].transpose(1, 2)
                native.softmax_backward_(p, grad_s, dim**-0.5, window, block_lse)
                grad_v[row, :, keys] += p.transpose(1, 2) @ grads
                grad_k[row, :, keys] += grad_s.transpose(1, 2) @ rows
                grad_q[row, :, queries] = (grad_s @ k[row, :, keys]).view(heads, -1, dim)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def available(q: Tensor) -> bool:
    """Whether `block_attention` can work on queries like these."""
    return native.available(q)


def block_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Attention of queries to the keys of their document, up to themselves.

    Args:
        q: `(batch, heads, seq, head_dim)`, float32 or bfloat16, on CPU.
        k: `(batch, kv_heads, seq, head_dim)`; each of its heads serves heads / kv_heads heads of q.
        v: as k.
        starts: int64 `(batch, seq)`, the first position of the document that a position belongs to.

    Returns:
        `(batch, heads, seq, head_dim)`, laid out as `(batch, seq, heads, head_dim)`.
    """
    starts = starts.expand(len(q), -1).contiguous()
    with no_autocast(q):
        output: Tensor = _BlockAttention.apply(q, k, v, starts)  # type: ignore[no-untyped-call]
    return output
