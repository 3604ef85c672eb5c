"""The state of a run of no size, as a checkpoint holds it."""

from typing import Any

import torch

from bitnet_train.training.state import rng_state


def tiny_state(step: int = 0) -> dict[str, Any]:
    """A state with one weight, of three times the step."""
    return {
        "identity": {"seed": 0, "model": "{}"},
        "step": step,
        "tokens": 0,
        "skipped": [0, 0],
        "model": {"w": torch.full((3,), float(step))},
        "optimizer": {"state": {}, "param_groups": []},
        "health": {},
        "ranks": [{"rng": rng_state(), "since_log": {}}],
    }
