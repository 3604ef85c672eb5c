"""Attention over documents end to end against torch's with a mask; on CPU a loop over documents takes torch's place."""

import dataclasses
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bitnet_train.kernels import native
from bitnet_train.model import varlen_attention as module
from bitnet_train.model.attention import BitNetAttention, Documents
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.varlen_attention import varlen_attention
from tests.support import TINY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def one_document_at_a_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = True,
) -> Tensor:
    """The same by torch's plain attention: `(tokens, heads, head_dim)` each, fewer heads of keys and values."""
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    parts = [x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)]
    documents = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in zip(*parts, strict=True)
    ]
    return torch.cat(documents, dim=1).transpose(0, 1)


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "varlen_attn", one_document_at_a_time)
    monkeypatch.setattr(native, "available", lambda *tensors, **options: False)
    with torch.device(DEVICE):
        yield


def test_outputs_and_gradients() -> None:
    shapes = ((3, 40, heads, 16) for heads in (4, 2, 2))
    q, k, v = inputs = [torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]
    ids = torch.randint(0, 2, (3, 40)).cumsum(dim=1) // 5
    ids[0] = 0  # one that fills the row
    documents = Documents(ids)
    assert module.available(q.device)
    assert module.fits(q.shape[-1], q.dtype)
    output = varlen_attention(q, k, v, *documents.measure())
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), attn_mask=documents.mask
    )
    grad = torch.randn_like(output)
    got = [output, *torch.autograd.grad(output, inputs, grad)]
    want = [expected, *torch.autograd.grad(expected, inputs, grad)]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


def test_a_decoder_of_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, two rows of documents: the same hidden states as with a mask."""
    model = BitNetForCausalLM(dataclasses.replace(TINY, quantize=False))
    ids, documents = torch.randint(TINY.vocab_size, (2, 24)), torch.arange(24).expand(2, 24) // torch.tensor([[9], [5]])
    attend = Mock(wraps=one_document_at_a_time if DEVICE == "cpu" else varlen_attn)
    monkeypatch.setattr(module, "varlen_attn", attend)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = model.model(ids, document_ids=documents)
        for layer in model.modules():
            if isinstance(layer, BitNetAttention):
                layer.backend = "sdpa"
        expected = model.model(ids, document_ids=documents)
    assert attend.call_count == TINY.num_hidden_layers
    assert (output - expected).norm() <= 1e-2 * expected.norm()


def test_other_documents_are_not_seen() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8).bfloat16() for _ in range(3))
    lengths = Documents(torch.tensor([[0] * 5 + [1] * 7])).measure()
    before = varlen_attention(q, k, v, *lengths)
    k[:, :, :5], v[:, :, :5] = 7.0, 7.0
    after = varlen_attention(q, k, v, *lengths)
    assert torch.equal(before[:, :, 5:], after[:, :, 5:])
    assert not torch.equal(before[:, :, :5], after[:, :, :5])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 12), (torch.bfloat16, 264)])
def test_what_it_is_not_for(dtype: torch.dtype, dim: int) -> None:
    assert not module.fits(dim, dtype)


def test_boundaries_are_those_of_the_rows_end_to_end() -> None:
    boundaries, longest = Documents(torch.tensor([[4, 4, 7, 4, -1, -1], [0, 0, 0, 0, 0, 0]])).measure()
    assert boundaries.tolist() == [0, 2, 3, 4, 6, 12]
    assert longest == 6


def test_torch_takes_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device torch's own function checks them, forward and backward."""
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    with torch.device("meta"):
        shapes = ((2, heads, 12, 64) for heads in (4, 2, 2))
        q, k, v = inputs = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        output = varlen_attention(q, k, v, torch.empty(5, dtype=torch.int32), 9)
        assert output.shape == (2, 4, 12, 64)
        for grad, x in zip(torch.autograd.grad(output, inputs, torch.empty_like(output)), inputs, strict=True):
            assert grad.shape == x.shape
