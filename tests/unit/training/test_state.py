"""What a checkpoint holds, and what becomes of it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet_train.errors import UserError
from bitnet_train.training.state import Found, _refused_by, check_weights, of_this_rank, rng_state, set_rng_state


def test_random_numbers_go_on_where_they_were() -> None:
    before = rng_state()
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    set_rng_state(before)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn


def test_a_smaller_group_goes_on_with_what_the_larger_one_had_summed_up() -> None:
    saved = [
        {"rng": rng_state(), "since_log": {"loss": torch.tensor([6.0, 2.0], dtype=torch.float64)}},
        {"rng": rng_state(), "since_log": {"loss": torch.tensor([1.0, 3.0], dtype=torch.float64)}},
    ]
    own = of_this_rank({"ranks": saved, "step": 5}, seed=1)
    assert own["since_log"]["loss"].tolist() == [7.0, 5.0]
    again = of_this_rank({"ranks": saved, "step": 5}, seed=1)
    assert torch.equal(own["rng"]["torch"], again["rng"]["torch"])
    assert not torch.equal(own["rng"]["torch"], saved[0]["rng"]["torch"])


def test_a_group_of_the_same_size_goes_on_with_its_own() -> None:
    saved = [{"rng": rng_state(), "since_log": {}}]
    assert of_this_rank({"ranks": saved, "step": 5}, seed=1) is saved[0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"weight": torch.zeros(1)},
            r"model\.weight must have the shape that it has in the model \(\(3, 2\)\), got \(1,\)",
        ),
        ({}, r"model\.weight must have .* \(\(3, 2\)\), got absent"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, r"model\.bias must have .* \(absent\), got \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(weights: dict[str, Tensor], message: str) -> None:
    model = nn.Linear(2, 3, bias=False)
    check_weights(Found(Path("step-000001"), {"model": dict(model.state_dict())}), model)
    with pytest.raises(UserError, match=rf"^step-000001/state\.pt: {message}; take another checkpoint$"):
        check_weights(Found(Path("step-000001"), {"model": weights}), model)


def test_generators_and_optimizers_refuse_what_does_not_fit_them() -> None:
    state = rng_state()
    for broken in (
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"python": [3, [1], None]},
        {"numpy": ["x", *state["numpy"][1:]]},
    ):
        with (
            pytest.raises(UserError, match=r"^f: does not fit the random generators .*; take another"),
            _refused_by("random generators", Path("f")),
        ):
            set_rng_state(state | broken)
    set_rng_state(state)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    without_groups: list[dict[str, Any]] = [{"state": {}, "param_groups": []}, {"state": {}}]
    for optimizer_state in without_groups:
        with pytest.raises(UserError, match=r"^f: does not fit the optimizer"), _refused_by("optimizer", Path("f")):
            optimizer.load_state_dict(optimizer_state)
