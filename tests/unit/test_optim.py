"""Parameter groups and the hyperparameters of a step."""

import pytest
import torch
from torch import nn

from bitnet_train.errors import UserError
from bitnet_train.optim import AdamW, parameter_groups, set_hyperparameters


def model() -> nn.Module:
    return nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": nn.RMSNorm(3)})


@pytest.mark.parametrize(("decay_norms", "decayed"), [(False, [(3, 4)]), (True, [(3, 4), (3,), (3,)])])
def test_matrices_decay_and_vectors_do_if_asked(decay_norms: bool, decayed: list[tuple[int, ...]]) -> None:
    groups = parameter_groups(model().named_parameters(), decay_norms)
    assert [tuple(p.shape) for p in groups[0]["params"]] == decayed
    assert sum(len(group["params"]) for group in groups) == 3


def test_every_group_gets_the_rate_and_decaying_ones_the_decay() -> None:
    optimizer = AdamW((0.9, 0.95), 1e-8, decay_norms=False, grad_clip=1.0).build(model().named_parameters())
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.25)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


def test_frozen_parameters_are_left_out() -> None:
    linear = nn.Linear(4, 3).requires_grad_(False)
    linear.bias.requires_grad_()
    assert [len(group["params"]) for group in parameter_groups(linear.named_parameters(), False)] == [1]


def test_one_update_is_adamw() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -1.0]]))
    optimizer = AdamW((0.9, 0.95), 1e-8, decay_norms=False, grad_clip=1.0).build([("w", parameter)])
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5)
    parameter.grad = torch.tensor([[3.0, -0.2]])
    optimizer.step()
    assert parameter.detach().tolist() == [pytest.approx([0.95 - 0.1, -0.95 + 0.1], rel=1e-5)]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.betas must lie in \[0, 1\)"):
        AdamW((0.9, 1.0), 1e-8, decay_norms=False, grad_clip=1.0)
    with pytest.raises(UserError, match=r"optimizer\.grad_clip .* got -1"):
        AdamW((0.9, 0.95), 1e-8, decay_norms=False, grad_clip=-1.0)
