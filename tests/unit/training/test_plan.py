"""The line that a run begins with."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitnet_train.optim import AdamW, AdamW8bit, OptimizerConfig
from bitnet_train.training.parts import print_plan

ADAMW = {"grad_clip": 1.0, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.mark.parametrize(
    ("optimizer", "taken"),
    [(AdamW(**ADAMW), "16.00 GB"), (AdamW8bit(**ADAMW), "10.00 GB")],  # type: ignore[arg-type]
)
def test_a_plan_counts_the_moments_that_the_optimizer_keeps(
    optimizer: OptimizerConfig, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model = nn.Linear(100_000, 10_000, bias=False)
    parts = SimpleNamespace(
        module=SimpleNamespace(model=model, optimizer_config=optimizer, steps=3),
        settings=SimpleNamespace(recipe_name="mine", global_batch_size=2),
        data=SimpleNamespace(
            config=SimpleNamespace(sequence_length=8), row_sets={"train": [1, 2, 3]}, steps_per_epoch=lambda: 1.5
        ),
    )
    with caplog.at_level(logging.INFO):
        print_plan(parts)  # type: ignore[arg-type]
    assert caplog.messages[-1].endswith(f"2.00 epochs; weights, gradients and optimizer take {taken}")
