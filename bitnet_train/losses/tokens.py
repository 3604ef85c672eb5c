"""Losses over tokens, as sums, that never hold `(tokens, vocab)` logits.

    l_t = log p(label_t) = logit[label_t] - lse_t        lse_t = log sum_j exp(logit_j)
    token_logps          l_t
    cross_entropy_sum    sum_t (-l_t + z lse_t^2)        z: the weight of the z-loss (Chowdhery et al., PaLM, section 5)

The logits of one chunk of positions exist at a time, in the compute dtype (autocast's, else that of the states); the
softmax runs in float32 and its gradient takes the logits' place:

    d(-l_t)/dlogits = p - onehot(label)        d(lse^2)/dlogits = 2 lse p

A sum knows its gradient while the logits are there, so that the forward pass makes it (Hsu et al., Liger Kernel, arXiv
2410.10989, section 3.2); single log-probabilities, as DPO needs them, have their logits made again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bitnet_train.autocast import compute_dtype, no_autocast
from bitnet_train.kernels import gpu, native
from bitnet_train.labels import IGNORE_INDEX

# 128 MB in bfloat16; where Triton's programs work on them 1 GB, since every chunk reads and writes the whole gradient
# of the head. Torch's passes take several times the memory of a chunk.
LOGITS_PER_CHUNK = {"cpu": 1 << 26, "cuda": 1 << 29}
WEIGHTS_PER_SLICE = 1 << 24  # of the head's gradient, where a slice waits for its sum
_ALIGNED = 64  # rows of a slice: a slice of the logits' columns begins where a product reads fast


def positions_at_once(weight: Tensor) -> int:
    """The number of positions whose logits under a head `(vocab, hidden)` exist at a time."""
    return max(1, LOGITS_PER_CHUNK["cuda" if weight.is_cuda and gpu.available(weight) else "cpu"] // len(weight))


def _chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    """Slices of the positions, equal but for the last."""
    most = positions_at_once(weight)
    size = -(-tokens // max(1, -(-tokens // most)))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size)))


def _log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """l and lse, float32 `(rows,)`, of logits `(rows, vocab)`."""
    if native.available(logits):
        return native.log_likelihood(logits, labels)
    if gpu.available(logits):
        return gpu.log_likelihood(logits, labels)
    logits = logits.float()
    lse = logits.logsumexp(dim=-1)
    return logits.gather(1, labels[:, None])[:, 0] - lse, lse


def _gradient_(logits: Tensor, labels: Tensor, lse: Tensor, p_factor: Tensor, label_factor: Tensor) -> Tensor:
    """The logits' place taken by softmax * p_factor - onehot(label) * label_factor, factors `(rows,)`."""
    for passes in (native, gpu):
        if passes.available(logits):
            passes.likelihood_gradient_(logits, labels, lse, p_factor.contiguous(), label_factor.contiguous())
            return logits
    p = logits.float().sub_(lse[:, None]).exp_().mul_(p_factor[:, None])
    return logits.copy_(p.scatter_add_(1, labels[:, None], -label_factor[:, None]))


class _HeadGradient:
    """Gradients of the states `(tokens, hidden)` and of the head `(vocab, hidden)`, gathered chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs_weight: bool) -> None:
        self.hidden = torch.empty_like(hidden, dtype=torch.float32)
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None

    def add(self, chunk: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds the gradient of a chunk's logits; `hidden` and `weight` are the factors of these logits."""
        if grad_logits.is_cuda and grad_logits.dtype in (torch.bfloat16, torch.float16):
            self._add_in_float32(chunk, grad_logits, hidden, weight)
            return
        self.hidden[chunk] = grad_logits @ weight
        if self.weight is not None:
            rows = max(1, WEIGHTS_PER_SLICE // weight.shape[1] // _ALIGNED) * _ALIGNED
            for total, part in zip(self.weight.split(rows), grad_logits.split(rows, dim=1), strict=True):
                total += part.t() @ hidden

    def _add_in_float32(self, chunk: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """The same where products add to float32 by themselves: nothing is rounded in between."""
        torch.mm(grad_logits, weight, out_dtype=torch.float32, out=self.hidden[chunk])
        if self.weight is not None:
            torch.addmm(self.weight, grad_logits.t(), hidden, out_dtype=torch.float32, out=self.weight)


class _CrossEntropySum(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z: float, dtype: torch.dtype, needs: tuple[bool, bool]
    ) -> Tensor:
        states, head = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), device=hidden.device, dtype=torch.float64)
        grads = _HeadGradient(hidden, weight, needs[1]) if any(needs) else None
        for chunk in _chunks(len(labels), weight):
            logits = states[chunk] @ head.t()
            logps, lse = _log_likelihood(logits, labels[chunk])
            total += (z * lse.square() - logps).sum(dtype=torch.float64)
            if grads is not None:
                ones = torch.ones_like(lse)
                grad_logits = _gradient_(logits, labels[chunk], lse, ones + 2 * z * lse, ones)
                grads.add(chunk, grad_logits, states[chunk], head)
        ctx.grads, ctx.dtypes = grads, (hidden.dtype, weight.dtype)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # multiplied in place: there is no second time
        (grad,) = grad_outputs
        if grads is None:
            raise RuntimeError("cross_entropy_sum keeps its gradient for one backward pass only")
        made = (grads.hidden, grads.weight)
        hidden, weight = (None if g is None else g.mul_(grad).to(d) for g, d in zip(made, ctx.dtypes, strict=True))
        return hidden, weight, None, None, None, None


class _TokenLogps(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        states, head = hidden.to(dtype), weight.to(dtype)
        logps, lse = torch.empty(2, len(labels), device=hidden.device).unbind()
        for chunk in _chunks(len(labels), weight):
            logps[chunk], lse[chunk] = _log_likelihood(states[chunk] @ head.t(), labels[chunk])
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.dtype = dtype
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        states, head, factor = hidden.to(ctx.dtype), weight.to(ctx.dtype), -grad_outputs[0]
        grads = _HeadGradient(hidden, weight, ctx.needs_input_grad[1])
        with no_autocast(hidden):
            for chunk in _chunks(len(labels), weight):
                logits = states[chunk] @ head.t()
                grad_logits = _gradient_(logits, labels[chunk], lse[chunk], factor[chunk], factor[chunk])
                grads.add(chunk, grad_logits, states[chunk], head)
        grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        return grads.hidden.to(hidden.dtype), grad_weight, None, None


def _kept(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States and labels of the positions that have a label, and their places, of which the host asks once.

    Raises:
        ValueError: states and labels have other positions.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have the positions of hidden {tuple(hidden.shape)}, got {tuple(labels.shape)}")
    at = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return hidden.flatten(0, -2).index_select(0, at), labels.flatten().index_select(0, at), at


def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label in nats, float32, in the shape of `labels`; 0 where the label is IGNORE_INDEX.

    Only positions with a label meet the head, a chunk at a time; a chunk's logits are made again in the backward pass.

    Args:
        hidden: `(..., hidden)`, the decoder's output.
        weight: `(vocab, hidden)`, the head. The product runs in autocast's dtype, the softmax in float32.
        labels: int64 `(...)`, the id that follows each position.
    """
    states, kept, at = _kept(hidden, labels)
    dtype = compute_dtype(hidden)
    with no_autocast(hidden):
        logps: Tensor = _TokenLogps.apply(states, weight, kept, dtype)  # type: ignore[no-untyped-call]
    return torch.zeros(labels.numel(), device=labels.device).index_copy(0, at, logps).view(labels.shape)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """sum of -log p(label) + z_loss lse^2 over the labels, in nats, float32, shape (); arguments as in `token_logps`.

    The gradient is made together with the loss, once: a second backward pass raises RuntimeError.
    """
    states, kept, _ = _kept(hidden, labels)
    dtype, grad_enabled = compute_dtype(hidden), torch.is_grad_enabled()
    needs = (grad_enabled and hidden.requires_grad, grad_enabled and weight.requires_grad)
    with no_autocast(hidden):
        loss: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
            states, weight, kept, z_loss, dtype, needs
        )
    return loss
