"""What a checkpoint holds, and what becomes of it."""

import random

import numpy as np
import torch

from bitnet_train.training.state import rng_state, set_rng_state


def test_random_numbers_go_on_where_they_were() -> None:
    before = rng_state()
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    set_rng_state(before)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn
