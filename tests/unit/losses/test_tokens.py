"""The losses against the plain formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bitnet_train.labels import IGNORE_INDEX
from bitnet_train.losses import tokens
from bitnet_train.losses.accuracy import correct_tokens
from bitnet_train.losses.tokens import cross_entropy_sum, token_logps


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :4] = labels[2] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("logits_per_chunk", [50, 200, 1 << 24])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch, logits_per_chunk: int) -> None:
    monkeypatch.setitem(tokens.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    hidden, weight, labels = problem()
    loss = cross_entropy_sum(hidden, weight, labels)
    plain = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain)
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_z_loss_and_a_factor_before_the_backward_pass(autocast: bool) -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = 3.0 * cross_entropy_sum(hidden, weight, labels, z_loss=0.1)
    kept = labels != IGNORE_INDEX
    logits = (hidden @ weight.t())[kept]
    z = logits.logsumexp(dim=-1).square().sum()
    plain = 3.0 * (F.cross_entropy(logits, labels[kept], reduction="sum") + 0.1 * z)
    tolerance = 2e-2 if autocast else 1e-5
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    wanted = torch.autograd.grad(plain, (hidden, weight))
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= tolerance * want.norm()


def test_each_log_probability_has_its_own_gradient() -> None:
    hidden, weight, labels = problem()
    factors = torch.randn(labels.shape)
    kept = labels != IGNORE_INDEX
    plain = (hidden @ weight.t()).log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    wanted = torch.autograd.grad((plain * factors)[kept].sum(), (hidden, weight))
    got = torch.autograd.grad((token_logps(hidden, weight, labels) * factors).sum(), (hidden, weight))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_in_the_backward_pass_changes_nothing() -> None:
    hidden, weight, labels = problem()
    logps = token_logps(hidden, weight, labels)
    expected = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(torch.autograd.grad(logps.sum(), (hidden, weight)), expected, strict=True):
            assert torch.equal(got, want)


def test_the_gradient_is_there_once() -> None:
    hidden, weight, labels = problem()
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_token_logps_stand_where_their_labels_are() -> None:
    hidden, weight, labels = problem()
    logps = token_logps(hidden, weight, labels)
    expected = (hidden @ weight.t()).log_softmax(dim=-1)
    assert logps[labels == IGNORE_INDEX].eq(0).all()
    assert torch.allclose(logps[1], expected[1].gather(-1, labels[1][:, None])[:, 0], atol=1e-5)


def test_no_label_at_all_is_no_loss() -> None:
    hidden, weight, labels = problem()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0.0


@pytest.mark.parametrize("logits_per_chunk", [50, 200, 1 << 24])
def test_correct_tokens_are_those_with_the_highest_logit(
    monkeypatch: pytest.MonkeyPatch, logits_per_chunk: int
) -> None:
    monkeypatch.setitem(tokens.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    hidden, weight, labels = problem()
    best = (hidden @ weight.t()).argmax(dim=-1)
    labels[1, :3] = best[1, :3]
    expected = int((best == labels).sum())
    assert correct_tokens(hidden, weight, labels) == expected >= 3
    assert correct_tokens(hidden, weight, torch.full_like(labels, IGNORE_INDEX)) == 0


@pytest.mark.parametrize("loss", [cross_entropy_sum, token_logps])
def test_labels_of_other_positions_are_refused(loss: Callable[..., torch.Tensor]) -> None:
    """Whoever forgets one side of the shift makes such labels."""
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=r"labels must have the positions of hidden \(3, 7, 16\), got \(3, 6\)"):
        loss(hidden, weight, labels[:, 1:])
