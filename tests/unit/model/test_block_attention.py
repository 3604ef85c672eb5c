"""Attention by blocks against torch's, in float64 and with a mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.kernels import native
from bitnet_train.model import block_attention as module
from bitnet_train.model.attention import Documents
from bitnet_train.model.block_attention import block_attention

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def heads(count: int, seq: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random `(3, count, seq, dim)` in the layout that the projections give."""
    return torch.randn(3, seq, count, dim).to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("queries", [16, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("kv_heads", "seq", "dim"), [(1, 1, 8), (2, 65, 16), (8, 300, 32)])
def test_outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    dtype: torch.dtype,
    tolerance: float,
    kv_heads: int,
    seq: int,
    dim: int,
) -> None:
    monkeypatch.setattr(module, "QUERIES", queries)
    q, k, v = heads(8, seq, dim, dtype), heads(kv_heads, seq, dim, dtype), heads(kv_heads, seq, dim, dtype)
    ids = torch.randint(0, 2, (3, seq)).cumsum(dim=1) // 9  # documents of some 18 tokens, and
    ids[0] = 0  # one that fills the row
    documents = Documents(ids)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(8 // kv_heads, dim=1) for x in exact[1:])
    expected = F.scaled_dot_product_attention(exact[0], keys, values, attn_mask=documents.mask)
    output = block_attention(q, k, v, documents.starts)
    grad = torch.randn_like(output)
    got = [output, *torch.autograd.grad(output, [q, k, v], grad)]
    want = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


def test_one_row_of_starts_serves_every_row() -> None:
    q, k, v = (heads(2, 20, 8, torch.float32) for _ in range(3))
    starts = Documents(torch.arange(20)[None] // 7).starts
    assert torch.equal(block_attention(q, k, v, starts), block_attention(q, k, v, starts.expand(3, -1)))


def test_autocast_in_either_direction_changes_nothing() -> None:
    q, k, v = inputs = [heads(2, 20, 8, torch.float32) for _ in range(3)]
    starts, grad = torch.zeros(3, 20, dtype=torch.int64), torch.randn(3, 2, 20, 8)
    expected = torch.autograd.grad(block_attention(q, k, v, starts), inputs, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(
            torch.autograd.grad(block_attention(q, k, v, starts), inputs, grad), expected, strict=True
        ):
            assert torch.equal(got, want)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (heads(2, 20, 8, torch.float32) for _ in range(3))
    output = block_attention(q * 1e4, k * 1e4, v, torch.zeros(3, 20, dtype=torch.int64))
    assert output.isfinite().all()


def test_documents_are_runs_of_equal_numbers() -> None:
    documents = Documents(torch.tensor([[4, 4, 7, 4, -1, -1]]))
    assert documents.starts.tolist() == [[0, 0, 2, 3, 4, 4]]
    assert documents.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
