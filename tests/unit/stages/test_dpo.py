"""The DPO stage: its reference is computed once, kept, and refused where it is of something else."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitnet_train.data.packing import PairRows
from bitnet_train.errors import UserError
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.stages.dpo import DirectPreference
from bitnet_train.stages.reference import completion_lengths, completion_logps, reference_logps
from tests.support import TINY, pairs_of

PAIRS = (([1, 2, 3], [4, 5, 6], [7]), ([8, 9], [10], [11, 12, 13, 14]), ([15], [16, 17], [18, 19]))


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(TINY)


def pair_rows(*pairs: tuple[list[int], list[int], list[int]]) -> PairRows:
    return PairRows(pairs_of(*pairs), pad_id=0)


def prepared(model: BitNetForCausalLM, cache: Path, *pairs: tuple[list[int], list[int], list[int]]) -> PairRows:
    rows = pair_rows(*pairs)
    DirectPreference().prepare(model, {"train": rows}, cache, nullcontext)
    return rows


def test_the_precomputed_reference_is_the_online_one_bit_for_bit(model: BitNetForCausalLM, tmp_path: Path) -> None:
    rows = prepared(model, tmp_path, *PAIRS)
    again = prepared(model, tmp_path, *PAIRS)  # from the file
    assert rows.reference_logps is not None
    assert again.reference_logps is not None
    online = reference_logps(model, rows)
    assert torch.equal(rows.reference_logps, online)
    assert torch.equal(again.reference_logps, online)
    batch = rows.collate([rows[2], rows[0]])
    assert torch.equal(batch.reference_logps, online[:, [2, 0]])


def test_policy_and_reference_agree_before_the_first_step(model: BitNetForCausalLM, tmp_path: Path) -> None:
    rows = prepared(model, tmp_path, *PAIRS)
    metrics = DirectPreference().step(model, rows.collate([rows[i] for i in range(3)])).metrics
    assert float(metrics["rewards/margins"].total) == pytest.approx(0.0, abs=1e-5)


def test_the_log_probability_of_a_completion_is_that_of_its_tokens(model: BitNetForCausalLM) -> None:
    rows = pair_rows(*PAIRS)
    batch = rows.collate([rows[1]])
    logps = completion_logps(model, batch.tokens)
    ids = torch.tensor([[8, 9, 11, 12, 13, 14]])
    by_hand = model(ids)[0].log_softmax(dim=-1)
    assert float(logps[1, 0]) == pytest.approx(sum(float(by_hand[i, ids[0, i + 1]]) for i in range(1, 5)), rel=1e-4)
    assert completion_lengths(batch.tokens).tolist() == [[1], [4]]


def test_other_weights_or_other_pairs_have_another_reference(model: BitNetForCausalLM, tmp_path: Path) -> None:
    prepared(model, tmp_path, *PAIRS)
    prepared(model, tmp_path, *PAIRS)
    assert len(list(tmp_path.iterdir())) == 1
    prepared(model, tmp_path, *PAIRS[:2])
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1e-3
    prepared(model, tmp_path, *PAIRS)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["header", "shape", "cut"])
def test_a_file_of_something_else_is_computed_again(model: BitNetForCausalLM, tmp_path: Path, damage: str) -> None:
    good = prepared(model, tmp_path, *PAIRS).reference_logps
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as tensors:
        key = tensors.metadata()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        wrong = torch.zeros(2, 2 if damage == "shape" else 3)
        save_file({"logps": wrong}, file, metadata=key | ({"weights": "others"} if damage == "header" else {}))
    again = prepared(model, tmp_path, *PAIRS).reference_logps
    assert good is not None
    assert again is not None
    assert torch.equal(again, good)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_without_a_reference_none_is_computed(model: BitNetForCausalLM, tmp_path: Path, loss_type: str) -> None:
    rows, stage = pair_rows(*PAIRS), DirectPreference(loss_type=loss_type, reference="none")
    stage.prepare(model, {"train": rows}, tmp_path, nullcontext)
    output = stage.step(model, rows.collate([rows[i] for i in range(3)]))
    assert not list(tmp_path.iterdir())
    assert output.loss_sum.isfinite()
    assert int(output.count) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "simpo"},
            "stage.loss_type must be one of sigmoid, .* stage.reference=initial, got 'simpo'",
        ),
        ({"reference": "none"}, "stage.loss_type must be one of simpo, orpo with stage.reference=none"),
        ({"reference": "other"}, "stage.reference must be initial or none, got 'other'"),
        ({"beta": 0.0}, "stage.beta must be above 0"),
        ({"label_smoothing": 0.5}, r"stage.label_smoothing must lie in \[0, 0.5\)"),
        ({"rpo_alpha": -1.0}, "stage.rpo_alpha and stage.simpo_gamma must be at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DirectPreference(**options)  # type: ignore[arg-type]
