"""The schedules, at the points that their sources show."""

import math

import pytest

from bitnet_train.errors import UserError
from bitnet_train.schedule import Cosine, Schedule, TwoStageCosine, TwoStageLinear

FAQ_700M = (1.5e-3, 1e-3, 3e-5, 375, 0.1)  # peak, second, end, warm-up, weight decay
T = 100_000


def test_two_stage_linear_goes_through_the_points_of_the_faq() -> None:
    schedule = TwoStageLinear(*FAQ_700M)
    assert schedule.lr(0, T) == 0.0
    assert schedule.lr(375, T) == 1.5e-3
    assert schedule.lr(49_950, T) == pytest.approx(7.69e-4, abs=1e-6)
    assert schedule.lr(50_050, T) == pytest.approx(5.16e-4, abs=1e-6)
    assert schedule.lr(T, T) == pytest.approx(3e-5, abs=1e-12)
    assert [schedule.weight_decay(step, T) for step in (0, 49_999, 50_000, T)] == [0.1, 0.1, 0.0, 0.0]


def test_two_stage_cosine_joins_the_second_curve_at_the_middle() -> None:
    schedule = TwoStageCosine(*FAQ_700M)
    half = (1 + math.cos(math.pi * (50_000 - 375) / (T - 375))) / 2
    assert schedule.lr(375, T) == 1.5e-3
    assert schedule.lr(50_000, T) == pytest.approx(3e-5 + (1e-3 - 3e-5) * half, rel=1e-12)
    assert schedule.lr(49_999, T) == pytest.approx(3e-5 + (1.5e-3 - 3e-5) * half, rel=1e-4)
    assert schedule.lr(T, T) == pytest.approx(3e-5, rel=1e-12)


def test_weight_decay_of_the_cosine_shape_rises_to_its_peak_and_ends() -> None:
    schedule = TwoStageCosine(*FAQ_700M)
    assert schedule.weight_decay(0, T) == 0.0
    assert schedule.weight_decay(25_000, T) == pytest.approx(0.05)
    assert schedule.weight_decay(49_999, T) == pytest.approx(0.1)
    assert schedule.weight_decay(50_000, T) == 0.0


def test_cosine() -> None:
    schedule = Cosine(peak_lr=1.0, end_lr=0.1, warmup_steps=10, peak_weight_decay=0.3)
    assert [schedule.lr(step, 110) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule.lr(60, 110) == pytest.approx(0.55)
    assert schedule.lr(110, 110) == pytest.approx(0.1)
    assert schedule.weight_decay(3, 110) == 0.3


@pytest.mark.parametrize("shape", [TwoStageLinear(*FAQ_700M), TwoStageCosine(*FAQ_700M), Cosine(1e-3, 1e-5, 375, 0.1)])
def test_a_run_that_ends_within_its_warm_up_has_finite_rates(shape: Schedule) -> None:
    for step in range(3):
        assert 0.0 <= shape.lr(step, 2) <= 1.5e-3


def test_negative_rates_are_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.peak_lr must be .* got -1"):
        TwoStageLinear(-1.0, 1e-3, 3e-5, 375, 0.1)
