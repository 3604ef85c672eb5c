"""The schedules, at the points that their sources show."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest

from bitnet_train.errors import UserError
from bitnet_train.schedule import Constant, Cosine, Schedule, TwoStageCosine, TwoStageLinear, WarmupStableDecay

T, W = 100_000, 375
LINEAR = TwoStageLinear(peak_lr=1.5e-3, second_lr=1e-3, end_lr=3e-5, warmup_steps=W, peak_weight_decay=0.1)  # FAQ, 700M
COSINE = TwoStageCosine(peak_lr=1.5e-3, second_lr=1e-3, end_lr=3e-5, warmup_steps=W, peak_weight_decay=0.1)
WSD = WarmupStableDecay(
    peak_lr=1.0, end_lr=0.1, warmup_steps=10, peak_weight_decay=0.3, decay_share=0.2, decay="linear"
)
SHAPES: list[Schedule] = [
    LINEAR,
    COSINE,
    WSD,
    Cosine(peak_lr=1e-3, end_lr=1e-5, warmup_steps=W, peak_weight_decay=0.1),
    Constant(peak_lr=1e-3, warmup_steps=W, peak_weight_decay=0.1),
]

# Read off the vector data of the FAQ's figure: peak and end of each line; between them in exact arithmetic.
FAQ_POINTS = {
    0: Fraction(0),
    375: Fraction("1.5e-3"),
    49_950: Fraction("1.5e-3") + (Fraction("3e-5") - Fraction("1.5e-3")) * Fraction(49_950 - W, T - W),
    50_050: Fraction("1e-3") + (Fraction("3e-5") - Fraction("1e-3")) * Fraction(50_050 - W, T - W),
    100_000: Fraction("3e-5"),
}


@pytest.mark.parametrize("step", FAQ_POINTS)
def test_two_stage_linear_goes_through_the_points_of_the_faq(step: int) -> None:
    assert LINEAR.lr(step, T) == pytest.approx(float(FAQ_POINTS[step]), abs=1e-9)


def test_the_points_are_those_that_the_faq_shows() -> None:
    assert float(FAQ_POINTS[49_950]) == pytest.approx(7.69e-4, abs=1e-6)
    assert float(FAQ_POINTS[50_050]) == pytest.approx(5.16e-4, abs=1e-6)


def test_weight_decay_of_the_linear_shape_ends_at_the_middle() -> None:
    assert [LINEAR.weight_decay(step, T) for step in (0, 49_999, 50_000, T)] == [0.1, 0.1, 0.0, 0.0]


def test_two_stage_cosine_joins_the_second_curve_at_the_middle() -> None:
    def cosine(peak: float, step: int) -> float:
        return 3e-5 + (peak - 3e-5) * math.cos(math.pi / 2 * (step - W) / (T - W)) ** 2

    assert COSINE.lr(W, T) == pytest.approx(1.5e-3, abs=1e-9)
    for step in (20_000, 49_950, 49_999):
        assert COSINE.lr(step, T) == pytest.approx(cosine(1.5e-3, step), abs=1e-9)
    for step in (50_000, 50_050, 80_000, T):
        assert COSINE.lr(step, T) == pytest.approx(cosine(1e-3, step), abs=1e-9)
    assert COSINE.lr(T, T) == pytest.approx(3e-5, abs=1e-9)


def test_weight_decay_of_the_cosine_shape_rises_to_its_peak_and_ends() -> None:
    assert COSINE.weight_decay(0, T) == 0.0
    assert COSINE.weight_decay(25_000, T) == pytest.approx(0.05, abs=1e-9)
    assert COSINE.weight_decay(49_999, T) == pytest.approx(0.1, abs=1e-9)
    assert COSINE.weight_decay(50_000, T) == 0.0


def test_cosine() -> None:
    schedule = Cosine(peak_lr=1.0, end_lr=0.1, warmup_steps=10, peak_weight_decay=0.3)
    assert [schedule.lr(step, 110) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule.lr(60, 110) == pytest.approx(0.55)
    assert schedule.lr(110, 110) == pytest.approx(0.1)
    assert schedule.weight_decay(3, 110) == 0.3


def test_wsd_is_constant_until_its_decay() -> None:
    assert [WSD.lr(step, 110) for step in (5, 10, 60, 89)] == [0.5, 1.0, 1.0, 1.0]
    assert WSD.lr(100, 110) == pytest.approx(0.55)
    assert WSD.lr(110, 110) == pytest.approx(0.1)


def test_wsd_falls_faster_at_first_along_the_square_root() -> None:
    sqrt = replace(WSD, decay="sqrt")
    assert sqrt.lr(95, 110) == pytest.approx(1.0 - 0.9 * 0.5)
    assert sqrt.lr(110, 110) == pytest.approx(0.1)


def test_constant() -> None:
    schedule = Constant(peak_lr=2.0, warmup_steps=4, peak_weight_decay=0.5)
    assert [schedule.lr(step, 100) for step in (0, 2, 4, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert schedule.weight_decay(99, 100) == 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_that_ends_within_its_warm_up_has_finite_rates(shape: Schedule) -> None:
    for step in range(3):
        assert 0.0 <= shape.lr(step, 2) <= 1.0


@pytest.mark.parametrize("tokens_per_step", [1_000, 4_000])
def test_a_warm_up_in_tokens_makes_the_rate_a_function_of_the_tokens(tokens_per_step: int) -> None:
    shape = replace(LINEAR, warmup_tokens=80_000).in_steps(tokens_per_step)
    total = 1_000_000 // tokens_per_step
    rates = [shape.lr(tokens // tokens_per_step, total) for tokens in (40_000, 80_000, 400_000, 800_000)]
    by_tokens = replace(LINEAR, warmup_steps=80_000)
    assert rates == pytest.approx([by_tokens.lr(tokens, 1_000_000) for tokens in (40_000, 80_000, 400_000, 800_000)])


def test_a_warm_up_in_tokens_is_rounded_up_to_steps() -> None:
    shape = Constant(peak_lr=1.0, warmup_steps=7, warmup_tokens=1_001, peak_weight_decay=0.0)
    assert shape.in_steps(500).warmup_steps == 3
    assert LINEAR.in_steps(500) is LINEAR


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.peak_lr must be .* got -1"):
        replace(WSD, peak_lr=-1.0)
    with pytest.raises(UserError, match=r"schedule\.warmup_steps must be .* got -1"):
        replace(WSD, warmup_steps=-1)
    with pytest.raises(UserError, match=r"schedule\.decay_share must lie in \(0, 1\], got 2"):
        replace(WSD, decay_share=2.0)
    with pytest.raises(UserError, match=r"schedule\.decay must be one of linear, sqrt, got 'log'"):
        replace(WSD, decay="log")
