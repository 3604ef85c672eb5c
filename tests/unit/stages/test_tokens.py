"""Pre-training and SFT on batches that are packed or not, with noise, by position."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_train.data.batches import TokenBatch, TokenRow, collate
from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.base import Stage, StageOutput
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.stages.sft import SupervisedFineTuning, add_neftune_noise
from tests.support import TINY


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(TINY)


def row(*lengths: int) -> TokenRow:
    """Documents of these lengths, whose ids depend on their length alone; the first two of each are not trained."""
    documents = [np.random.default_rng(length).integers(3, 300, size=length) for length in lengths]
    trained = np.concatenate([np.arange(length) >= 2 for length in lengths]).astype(np.int64)
    return TokenRow(np.concatenate(documents), trained, np.repeat(np.arange(len(lengths)), lengths))


def gradient(stage: Stage, model: BitNetForCausalLM, batches: Sequence[TokenBatch]) -> tuple[Tensor, float, int]:
    """The gradient of the summed loss, the loss and the count."""
    model.zero_grad()
    outputs: list[StageOutput] = [stage.step(model, batch) for batch in batches]
    loss = torch.stack([output.loss_sum for output in outputs]).sum()
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return grads, loss.item(), sum(int(output.count) for output in outputs)


@pytest.mark.parametrize("stage", [Pretrain(), SupervisedFineTuning()])
def test_packed_or_not_the_sums_are_the_same(model: BitNetForCausalLM, stage: Stage) -> None:
    """float32, 1e-6 of the gradient's norm."""
    packed = gradient(stage, model, [collate([row(9, 14, 5), row(20, 7)], pad_id=0)])
    alone = gradient(stage, model, [collate([row(n)], pad_id=0) for n in (9, 14, 5, 20, 7)])
    assert packed[2] == alone[2] == 9 + 14 + 5 + 20 + 7 - 2 * 5
    assert packed[1] == pytest.approx(alone[1], rel=1e-6)
    assert (packed[0] - alone[0]).norm() < 1e-6 * alone[0].norm()


def test_losses_by_position_add_up_to_the_loss(model: BitNetForCausalLM) -> None:
    stage, batch = Pretrain(position_buckets=[4, 10]), collate([row(9, 14), row(20)], pad_id=0)
    plain = Pretrain().step(model.eval(), batch)
    output = stage.step(model, batch)
    assert set(output.metrics) == {"loss_at/0", "loss_at/4", "loss_at/10"}
    assert float(output.loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-6)
    assert sum(float(mean.total) for mean in output.metrics.values()) == pytest.approx(float(plain.loss_sum), rel=1e-5)
    assert [int(mean.weight) for mean in output.metrics.values()] == [3 * 3, 4 + 6 + 6, 3 + 9]
    assert not stage.step(model.train(), batch).metrics


def test_a_bucket_holds_the_losses_at_its_positions(model: BitNetForCausalLM) -> None:
    model.eval()
    long, short = collate([row(14)], pad_id=0), collate([TokenRow(*(field[:5] for field in row(14)))], pad_id=0)
    first = Pretrain(position_buckets=[4]).step(model, long).metrics["loss_at/0"]
    assert float(first.total) == pytest.approx(float(Pretrain().step(model, short).loss_sum), rel=1e-5)


@pytest.mark.parametrize("buckets", [[4, 4], [10, 4], [0, 4], [-1]])
def test_buckets_that_do_not_rise_are_refused(buckets: list[int]) -> None:
    with pytest.raises(UserError, match=r"stage\.position_buckets must rise and lie above 0"):
        Pretrain(position_buckets=buckets)


def test_accuracy_is_reported_at_validation(model: BitNetForCausalLM) -> None:
    batch = collate([row(9, 14)], pad_id=0)
    hits = SupervisedFineTuning().step(model.eval(), batch).metrics["mean_token_accuracy"]
    guesses = model(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids).argmax(dim=-1)
    trained = batch.labels != -100
    assert int(hits.total) == int((guesses == batch.labels)[trained].sum())
    assert int(hits.weight) == int(trained.sum())
    assert not SupervisedFineTuning().step(model.train(), batch).metrics


def test_noise_is_added_while_training_only(model: BitNetForCausalLM) -> None:
    batch, noisy = collate([row(9, 14)], pad_id=0), SupervisedFineTuning(neftune_noise_alpha=5.0)
    plain = SupervisedFineTuning().step(model.train(), batch).loss_sum
    assert noisy.step(model, batch).loss_sum != plain
    assert noisy.step(model.eval(), batch).loss_sum == plain


def test_noise_depends_on_the_length_of_the_document_not_of_the_row() -> None:
    documents = torch.tensor([[0] * 4 + [1] * 16, [0] * 16 + [-1] * 4])
    noise = add_neftune_noise(torch.zeros(2, 20, 64), documents, alpha=8.0).abs()
    for part, length in ((noise[0, :4], 4), (noise[0, 4:], 16), (noise[1, :16], 16)):
        limit = 8.0 / (length * 64) ** 0.5
        assert 0.9 * limit < float(part.max()) <= limit


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"stage\.neftune_noise_alpha must be at least 0"):
        SupervisedFineTuning(neftune_noise_alpha=-1.0)
    with pytest.raises(UserError, match=r"stage\.reduction must be mean or sum, got 'avg'"):
        Pretrain(reduction="avg")
