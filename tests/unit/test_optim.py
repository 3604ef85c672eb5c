"""Parameter groups, the hyperparameters of a step, and optimizers that go on where they stopped."""

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.optim import (
    AdamW,
    AdamW8bit,
    ByTarget,
    Muon,
    OptimizerConfig,
    Together,
    parameter_groups,
    set_hyperparameters,
)
from tests.support import TINY

ADAMW = AdamW(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0)
OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": ADAMW,
    "adamw_8bit": AdamW8bit(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0),
    "muon": Muon(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0),
    "nadam": ByTarget(target="torch.optim.NAdam", options={"momentum_decay": 5e-3}, grad_clip=1.0),
}


def model() -> nn.Module:
    return nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": nn.RMSNorm(3)})


@pytest.mark.parametrize(
    ("no_decay", "decayed"),
    [
        (["*norm.weight", "*.bias"], [(3, 4)]),
        ([], [(3, 4), (3,), (3,)]),
        (["linear.*"], [(3,)]),
    ],
)
def test_what_no_decay_names_does_not_decay(no_decay: list[str], decayed: list[tuple[int, ...]]) -> None:
    groups = parameter_groups(model().named_parameters(), no_decay)
    assert [tuple(p.shape) for p in groups[0]["params"]] == decayed
    assert sum(len(group["params"]) for group in groups) == 3


def test_all_norms_of_the_decoder_are_spared_by_default() -> None:
    named = dict(BitNetForCausalLM(TINY).named_parameters())
    decayed, kept = parameter_groups(named.items(), ADAMW.no_decay)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}


def test_every_group_gets_the_rate_and_decaying_ones_the_decay() -> None:
    optimizer = ADAMW.build(model().named_parameters())
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.25)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


def test_frozen_parameters_are_left_out() -> None:
    linear = nn.Linear(4, 3).requires_grad_(False)
    linear.bias.requires_grad_()
    assert [len(group["params"]) for group in parameter_groups(linear.named_parameters(), [])] == [1]


def test_one_update_is_adamw() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -1.0]]))
    optimizer = ADAMW.build([("w", parameter)])
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5)
    parameter.grad = torch.tensor([[3.0, -0.2]])
    optimizer.step()
    assert parameter.detach().tolist() == [pytest.approx([0.95 - 0.1, -0.95 + 0.1], rel=1e-5)]


def test_muon_takes_the_matrices_inside_the_decoder_and_adamw_the_rest() -> None:
    named = dict(BitNetForCausalLM(TINY).named_parameters())
    optimizer = OPTIMIZERS["muon"].build(named.items())
    assert isinstance(optimizer, Together)
    muon, adamw = (
        {name for group in part.param_groups for p in group["params"] for name in named if named[name] is p}
        for part in optimizer.parts
    )
    assert muon == {name for name in named if name.endswith("_proj.weight")}
    assert muon | adamw == set(named)
    assert "model.embed_tokens.weight" in adamw


def test_muon_moves_a_matrix_by_an_orthogonal_one() -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    config = Muon(betas=(0.9, 0.95), eps=1e-8, grad_clip=0.0, momentum=0.0, adjust_lr_fn="original")
    optimizer = config.build([("layer.weight", weight)])
    set_hyperparameters(optimizer, lr=1.0, weight_decay=0.0)
    weight.grad = torch.diag(torch.arange(1.0, 9.0))
    optimizer.step()
    step = -weight.detach()
    assert (step - torch.diag(step.diag())).abs().max() < 0.02
    assert step.diag().min() > 0.5  # Newton-Schulz brings singular values to 0.7 .. 1.2, not to 1
    assert step.diag().max() < 1.3


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: Iterable[int]) -> None:
    """Updates with gradients that depend on the number of the step alone."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_hyperparameters(optimizer, lr=1e-2 / (1 + number), weight_decay=0.1)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = BitNetForCausalLM(TINY)
    halved = copy.deepcopy(whole)
    steps(whole, OPTIMIZERS[name].build(whole.named_parameters()), range(6))

    optimizer = OPTIMIZERS[name].build(halved.named_parameters())
    steps(halved, optimizer, range(3))
    file = tmp_path_factory.mktemp(name) / "state.pt"
    torch.save(optimizer.state_dict(), file)
    resumed = OPTIMIZERS[name].build(halved.named_parameters())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(halved, resumed, range(3, 6))

    for left, right in zip(whole.parameters(), halved.parameters(), strict=True):
        assert torch.equal(left, right)
    start = BitNetForCausalLM(TINY).state_dict()
    assert not torch.equal(start["model.norm.weight"], whole.state_dict()["model.norm.weight"])


def test_eight_bits_hold_the_moments_of_matrices() -> None:
    decoder = BitNetForCausalLM(TINY)
    optimizer = OPTIMIZERS["adamw_8bit"].build(decoder.named_parameters())
    steps(decoder, optimizer, range(1))
    assert optimizer.state[decoder.model.embed_tokens.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[decoder.model.norm.weight]["state1"].dtype == torch.float32


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.betas must lie in \[0, 1\)"):
        AdamW(betas=(0.9, 1.0), eps=1e-8, grad_clip=1.0)
    with pytest.raises(UserError, match=r"optimizer\.grad_clip .* got -1"):
        AdamW(betas=(0.9, 0.95), eps=1e-8, grad_clip=-1.0)
    with pytest.raises(UserError, match=r"optimizer\.momentum must lie in \[0, 1\), got 1"):
        Muon(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0, momentum=1.0)
    with pytest.raises(UserError, match=r"optimizer\.adjust_lr_fn must be one of .*, got 'mine'"):
        Muon(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0, adjust_lr_fn="mine")
    with pytest.raises(UserError, match="leaves no matrix to Muon"):
        Muon(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0, adamw=["*"]).build(model().named_parameters())


NO_OPTIMIZER = r"^optimizer\._target_ must name a class of the kind torch\.optim\.optimizer\.Optimizer"


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        *((target, {}, NO_OPTIMIZER) for target in ("torch.optim.Nothing", "no.Thing", "torch.nn.Linear", "os.system")),
        ("torch.optim.NAdam", {"wrong": 1}, "refuses its options"),
    ],
)
def test_a_foreign_optimizer_that_is_none_is_refused(target: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ByTarget(target=target, options=options, grad_clip=1.0).build(model().named_parameters())
