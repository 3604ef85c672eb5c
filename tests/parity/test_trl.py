"""SFT and DPO against TRL 1.16: losses and metrics of given log-probabilities, and the gradients of a whole step."""

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet_train.data.batches import PairBatch, TokenBatch, TokenRow, collate
from bitnet_train.losses.preference import PairScores
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Stage
from bitnet_train.stages.dpo import DirectPreference
from bitnet_train.stages.reference import completion_logps
from bitnet_train.stages.sft import SupervisedFineTuning, add_neftune_noise
from tests.support import TINY, tiny_tokenizer

trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")
neftune = pytest.importorskip("transformers.integrations.neftune")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

PAIRS = 5
LOSSES = ["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sigmoid_norm"]


def stage_of(loss_type: str) -> DirectPreference:
    return DirectPreference(loss_type=loss_type, beta=0.3, label_smoothing=0.1 if loss_type == "robust" else 0.0)


# The same log-probabilities


def logps_of_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens, policy and reference, `(2 pairs, seq - 1)`, and the mask `(2 pairs, seq)`."""
    mask = torch.zeros(2 * PAIRS, 9, dtype=torch.int64)
    for row, length in enumerate([3, 7, 1, 5, 2, 4, 6, 1, 3, 7]):
        mask[row, 2 : 2 + length] = 1
    policy, reference = (-torch.rand(2 * PAIRS, 8) * 3 * mask[:, 1:] for _ in range(2))
    return policy, reference, mask


def trl_dpo(loss_type: str, policy: Tensor, reference: Tensor, mask: Tensor) -> tuple[float, dict[str, float]]:
    """Loss and metrics of TRL's own `_compute_loss`, with a model that knows the answers."""
    from accelerate import Accelerator

    stage = stage_of(loss_type)
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer.__dict__ |= {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(cpu=True),
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": stage.beta,
        "label_smoothing": stage.label_smoothing,
        "f_divergence_type": "reverse_kl",
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "ld_alpha": None,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    nothing = torch.zeros_like(policy)
    output = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    ids = torch.zeros_like(mask)
    chosen, rejected = reference.sum(dim=-1).chunk(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trainer._compute_loss(lambda **_: output, inputs, return_outputs=False)
    return float(loss), {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_metrics_of_given_logps(loss_type: str) -> None:
    """1e-6 relative, float32: the same formulas in the same type."""
    policy, reference, mask = logps_of_tokens()
    loss, metrics = trl_dpo(loss_type, policy, reference, mask)
    scores = PairScores(*policy.sum(dim=-1).view(2, -1), *mask.sum(dim=-1).view(2, -1))
    reference = reference.sum(dim=-1).view(2, -1)
    stage = stage_of(loss_type)
    assert float(stage.losses(scores, reference).mean()) == pytest.approx(loss, rel=1e-6)
    ours = stage.metrics(scores, reference)
    names = [name for name in ours if name != "logps/accuracies"]
    assert set(names) == {name for name in metrics if name.startswith(("rewards/", "logps/"))}
    for name in names:
        assert float(ours[name].mean()) == pytest.approx(metrics[name], rel=1e-6), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_and_smoothed_sigmoid(smoothing: float) -> None:
    """TRL's CPO trainer has both; the sigmoid of its `cpo_loss` is DPO's with the reference subtracted before."""
    policy, _, mask = logps_of_tokens()
    scores = PairScores(*policy.sum(dim=-1).view(2, -1), *mask.sum(dim=-1).view(2, -1))
    trainer = cpo.CPOTrainer.__new__(cpo.CPOTrainer)
    trainer.__dict__ |= {"alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": smoothing}
    trainer.accelerator = SimpleNamespace(device="cpu")
    for loss_type, given in (("simpo", scores.per_token()), ("sigmoid", scores)):
        trainer.loss_type = loss_type
        losses, chosen, rejected = trainer.cpo_loss(given.chosen, given.rejected)
        stage = DirectPreference(
            loss_type=loss_type,
            reference="none" if loss_type == "simpo" else "initial",
            beta=2.0,
            simpo_gamma=0.5,
            label_smoothing=smoothing,
        )
        nothing = torch.zeros(2, PAIRS)
        torch.testing.assert_close(stage.losses(scores, nothing), losses, rtol=1e-6, atol=0.0)
        metrics = stage.metrics(scores, nothing)
        torch.testing.assert_close(metrics["rewards/chosen"], chosen, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(metrics["rewards/rejected"], rejected, rtol=1e-6, atol=0.0)


def test_odds_ratio_of_orpo() -> None:
    """TRL returns beta log sigmoid(log odds ratio), which its loss subtracts from the likelihood of the chosen."""
    policy, _, mask = logps_of_tokens()
    scores = PairScores(*policy.sum(dim=-1).view(2, -1), *mask.sum(dim=-1).view(2, -1))
    mean = scores.per_token()
    trainer = orpo.ORPOTrainer.__new__(orpo.ORPOTrainer)
    trainer.beta, trainer.accelerator = 0.3, SimpleNamespace(device="cpu")
    ratios, chosen, *_ = trainer.odds_ratio_loss(mean.chosen, mean.rejected)
    stage = DirectPreference(loss_type="orpo", reference="none", beta=0.3)
    losses = stage.losses(scores, torch.zeros(2, PAIRS))
    torch.testing.assert_close(losses + mean.chosen, -ratios, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stage.metrics(scores, torch.zeros(2, PAIRS))["rewards/chosen"], chosen)


# A whole step


@pytest.fixture(scope="module")
def decoder() -> BitNetForCausalLM:
    """A dense twin: rounding would blow the last bits of two implementations up."""
    torch.manual_seed(0)
    return BitNetForCausalLM(replace(TINY, quantize=False, initializer_range=0.1)).train()


def theirs(ours: BitNetForCausalLM) -> nn.Module:
    """transformers' model with our weights."""
    json = ours.config.to_json()
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**json, bos_token_id=0, eos_token_id=1))
    model.load_state_dict(ours.state_dict(), strict=False)  # lm_head.weight is tied
    model.tie_weights()
    assert isinstance(model, nn.Module)
    return model.train()


def completion_row(prompt: list[int], completion: list[int]) -> TokenRow:
    """One document of prompt and completion, of which the completion is trained."""
    ids = np.array(prompt + completion)
    return TokenRow(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.int64), np.zeros_like(ids))


def rows(count: int, seed: int) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of each pair."""
    numbers = np.random.default_rng(seed)
    return [
        [numbers.integers(3, 200, size=size).tolist() for size in numbers.integers(2, 9, size=3)] for _ in range(count)
    ]


def compare(ours: BitNetForCausalLM, hf: nn.Module) -> None:
    """1e-4 relative to the norm of each gradient, float32."""
    expected = {name: p.grad for name, p in hf.named_parameters()}
    for name, parameter in ours.named_parameters():
        want = expected[name]
        assert parameter.grad is not None
        assert want is not None
        difference = (parameter.grad - want).norm() / want.norm()
        assert difference < 1e-4, (name, difference)


def trainer_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": PAIRS,
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def hf_tokenizer(folder: Path) -> Any:
    tiny_tokenizer().save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours_step(stage: Stage, model: BitNetForCausalLM, batch: TokenBatch | PairBatch) -> float:
    """The mean loss of one step, gradients left in the model."""
    model.zero_grad()
    output = stage.step(model, batch)
    loss = output.loss_sum / output.count
    loss.backward()
    return loss.item()


def test_one_step_of_sft(decoder: BitNetForCausalLM, tmp_path: Path) -> None:
    pairs = rows(PAIRS, seed=1)
    batch = collate([completion_row(prompt, chosen) for prompt, chosen, _ in pairs], pad_id=0)
    examples = [{"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen} for prompt, chosen, _ in pairs]
    hf = theirs(decoder)
    trainer = trl.SFTTrainer(
        model=hf,
        args=trl.SFTConfig(**trainer_arguments(tmp_path), max_length=None),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=hf_tokenizer(tmp_path),
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    hf.zero_grad()
    loss = trainer.compute_loss(hf, inputs)
    loss.backward()
    assert ours_step(SupervisedFineTuning(reduction="mean"), decoder, batch) == pytest.approx(loss.item(), rel=1e-6)
    compare(decoder, hf)
    decoder.eval()
    metrics = SupervisedFineTuning().step(decoder, batch).metrics["mean_token_accuracy"]
    decoder.train()
    assert float(metrics.total / metrics.weight) == pytest.approx(trainer._metrics["train"]["mean_token_accuracy"][0])


class DPOProblem(NamedTuple):
    """TRL's trainer and ours, with one batch of the same pairs."""

    trainer: Any
    hf: nn.Module
    inputs: dict[str, Tensor]
    policy: BitNetForCausalLM
    batch: PairBatch


@pytest.fixture(scope="module")
def problem(decoder: BitNetForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> DPOProblem:
    """The trainer is given a pair of words to be made; its collator then takes our ids."""
    folder, pairs = tmp_path_factory.mktemp("trl"), rows(PAIRS, seed=2)
    policy = copy.deepcopy(decoder)
    with torch.no_grad():  # moved away from its reference
        for index, parameter in enumerate(policy.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    tokens = collate(
        [*(completion_row(p, c) for p, c, _ in pairs), *(completion_row(p, r) for p, _, r in pairs)], pad_id=0
    )
    with torch.no_grad():
        batch = PairBatch(tokens, completion_logps(decoder, tokens))
    hf = theirs(policy)
    trainer = trl.DPOTrainer(
        model=hf,
        ref_model=theirs(decoder),
        args=trl.DPOConfig(**trainer_arguments(folder), max_length=None),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=hf_tokenizer(folder),
    )
    inputs = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs])
    return DPOProblem(trainer, hf, inputs, policy, batch)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_step_of_dpo(problem: DPOProblem, loss_type: str) -> None:
    trainer, hf, inputs, policy, batch = problem
    stage = stage_of(loss_type)
    trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], stage.beta, stage.label_smoothing
    hf.zero_grad()
    loss = trainer.compute_loss(hf, inputs)
    loss.backward()
    assert ours_step(stage, policy, batch) == pytest.approx(loss.item(), rel=1e-5)
    compare(policy, hf)


def test_an_sft_term_is_theirs_where_every_pair_stands_alone(problem: DPOProblem) -> None:
    """TRL averages over the tokens of a micro-batch, the paper and we over those of each completion."""
    trainer, hf, inputs, policy, batch = problem
    stage = DirectPreference(rpo_alpha=0.7)
    trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 0.7]
    trainer.beta, trainer.label_smoothing = stage.beta, 0.0
    hf.zero_grad()
    policy.zero_grad()
    pair = [2, 2 + PAIRS]
    loss = trainer.compute_loss(hf, {name: value[pair] for name, value in inputs.items()})
    loss.backward()
    trainer.loss_weights = [1.0]
    alone = PairBatch(TokenBatch(*(field[pair] for field in batch.tokens)), batch.reference_logps[:, 2:3])
    assert ours_step(stage, policy, alone) == pytest.approx(loss.item(), rel=1e-5)
    compare(policy, hf)


def test_neftune_is_as_strong_as_theirs() -> None:
    """The same draws give the same noise for a row that is one document."""
    embeds = torch.randn(2, 7, 16)
    module = nn.Embedding(1, 1).train()
    module.register_buffer("neftune_noise_alpha", torch.tensor(5.0))
    torch.manual_seed(3)
    expected = neftune.neftune_post_forward_hook(module, None, embeds)
    torch.manual_seed(3)
    torch.testing.assert_close(add_neftune_noise(embeds, torch.zeros(2, 7, dtype=torch.int64), 5.0), expected)
