"""The losses over pairs against their papers' formulas, and what they pull at."""

import math

import pytest
import torch

from bitnet_train.losses.preference import (
    WITH_REFERENCE,
    WITHOUT_REFERENCE,
    LossOptions,
    PairScores,
    log_odds,
    sft_term,
)

SCORES = PairScores(
    torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.tensor([2.0, 4.0]), torch.tensor([5.0, 3.0])
)
LOGPS = SCORES._replace(chosen=torch.tensor([-1.0, -2.0]), rejected=torch.tensor([-4.0, -0.5]))
OPTIONS = LossOptions(beta=0.3, smoothing=0.1, gamma=0.2)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


def by_hand(name: str, c: float, r: float, n_c: float, n_r: float) -> float:
    """The loss of one pair in plain Python."""
    beta, e, gamma = OPTIONS
    d, per_token = beta * (c - r), c / n_c - r / n_r
    formulas = {
        "sigmoid": lambda: -(1 - e) * math.log(s(d)) - e * math.log(s(-d)),
        "robust": lambda: (-(1 - e) * math.log(s(d)) + e * math.log(s(-d))) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - d),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - s(beta * c) + s(beta * r),
        "apo_down": lambda: s(beta * c) + 1 - s(d),
        "sigmoid_norm": lambda: -(1 - e) * math.log(s(beta * per_token)) - e * math.log(s(-beta * per_token)),
        "simpo": lambda: -(1 - e) * math.log(s(beta * per_token - gamma)) - e * math.log(s(gamma - beta * per_token)),
        "orpo": lambda: -c / n_c - beta * math.log(s(math.log(odds(c / n_c) / odds(r / n_r)))),
    }
    return formulas[name]()


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_every_loss_is_its_formula(name: str) -> None:
    scores = LOGPS if name in WITHOUT_REFERENCE else SCORES
    losses = {**WITH_REFERENCE, **WITHOUT_REFERENCE}[name](scores, OPTIONS)
    expected = [by_hand(name, *(float(value[i]) for value in scores)) for i in range(2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_every_loss_pushes_chosen_above_rejected(name: str) -> None:
    """The difference between the two gradients; apo_down pushes both down, rejected more."""
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    length = torch.tensor([4.0])
    loss = {**WITH_REFERENCE, **WITHOUT_REFERENCE}[name](PairScores(chosen, rejected, length, length), OPTIONS)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert float(rejected.grad - chosen.grad) > 0.0


def test_a_score_is_relative_to_the_reference() -> None:
    scores = LOGPS.relative_to(torch.tensor([[-2.0, -2.0], [-4.0, -1.0]]))
    assert scores.chosen.tolist() == [1.0, 0.0]
    assert scores.rejected.tolist() == [0.0, 0.5]
    assert torch.equal(scores.chosen_length, LOGPS.chosen_length)


def test_the_sft_term_is_a_mean_per_token_of_the_chosen() -> None:
    assert sft_term(LOGPS).tolist() == [0.5, 0.5]


def test_log_odds_of_a_half_are_zero() -> None:
    assert float(log_odds(torch.tensor(0.5).log())) == pytest.approx(0.0, abs=1e-6)
    assert float(log_odds(torch.tensor(-1e-4))) == pytest.approx(math.log(1e4), rel=1e-3)
