"""What a checkpoint holds, and what becomes of it."""

import random

import numpy as np
import torch

from bitnet_train.training.state import of_this_rank, rng_state, set_rng_state


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
