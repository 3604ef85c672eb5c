"""The three stages as whole runs: how a batch is cut changes nothing, and what must not learn does not."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitnet_train.config import recipe_names
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.model.pretrained import load_for_inference
from tests.runs import Train, last, metrics, trainer_in
from tests.support import TINY_OVERRIDES, chat_rows, preference_rows, sentence, text_rows, tiny_tokenizer, write_jsonl

RUN = [
    "trainer=cpu",
    "data.cache_dir=cache",
    "data.sequence_length=127",
    "global_batch_size=8",
    "micro_batch_size=8",
    "val_every=1000",
    "log_every=1",
]
FRESH = [*TINY_OVERRIDES, "model.hidden_size=128", "model.num_hidden_layers=2", "data.tokenizer=tokenizer"]
STAGES = {
    "pretrain": ["+recipe=pretrain", "init_from=base", "data.train=text.jsonl"],
    "sft": ["+recipe=sft", "init_from=base", "data.train=chat.jsonl"],
    "dpo": ["+recipe=dpo", "init_from=base", "data.train=pairs.jsonl"],
}
SGD = ["optimizer=custom", "optimizer._target_=torch.optim.SGD", "optimizer.grad_clip=0"]


def answers(count: int, right: str, wrong: str) -> list[dict[str, object]]:
    return [{"prompt": sentence(i), "chosen": f"{right} {right}", "rejected": f"{wrong} {wrong}"} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and rows of every kind."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "tokenizer").mkdir()
    tiny_tokenizer().save(folder / "tokenizer")
    files = {
        "text": text_rows(60),
        "chat": chat_rows(24),
        "pairs": preference_rows(24),
        "right": answers(48, "fox", "dog"),
        "swapped": answers(48, "dog", "fox"),
        "shuffled": [
            row for pair in zip(answers(24, "fox", "dog"), answers(24, "dog", "fox"), strict=True) for row in pair
        ],
    }
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains in that folder, where base/ holds a model that has seen a little text."""
    train = trainer_in(folder, monkeypatch)
    if not (folder / "base/model").is_dir():
        train("base", "+recipe=pretrain", *RUN, *FRESH, "data.train=text.jsonl", "max_steps=8", "schedule=constant")
    return train


def change(folder: Path, run_dir: Path) -> Tensor:
    """What training added to the weights of base/, as one vector."""
    before, after = (load_file(path / "model/model.safetensors") for path in (folder / "base", run_dir))
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


@pytest.mark.parametrize("stage", STAGES)
def test_the_cut_into_micro_batches_changes_neither_gradient_nor_loss(folder: Path, train: Train, stage: str) -> None:
    """One step of SGD at rate 1: the change of the weights is the gradient. float32, 1e-6 of its norm."""
    once = ["max_steps=1", "schedule.peak_lr=1.0", "schedule.warmup_steps=0", "schedule.peak_weight_decay=0.0", *SGD]
    runs = [
        train(
            f"cut-{stage}-{size}", *STAGES[stage], *RUN, *once, "trainer.precision=32-true", f"micro_batch_size={size}"
        )
        for size in (8, 4, 1)
    ]
    whole = change(folder, runs[0])
    assert whole.norm() > 0.01
    for run_dir in runs[1:]:
        assert (change(folder, run_dir) - whole).norm() < 1e-6 * whole.norm()
        for name in ("train/loss", "train/grad_norm"):
            assert last(run_dir, name) == pytest.approx(last(runs[0], name), rel=1e-6)


def test_labels_decide_what_is_learned(train: Train) -> None:
    """Right, swapped, and as often the one as the other; measured on right ones."""
    common = [
        *STAGES["dpo"],
        *RUN,
        "data.val=right.jsonl",
        "max_steps=8",
        "schedule.peak_lr=1e-3",
        "global_batch_size=16",
    ]
    right, swapped, shuffled = (
        train(f"labels-{name}", *common, f"data.train={name}.jsonl", "schedule.warmup_steps=2")
        for name in ("right", "swapped", "shuffled")
    )
    assert last(right, "val/rewards/accuracies") > 0.9
    assert last(swapped, "val/rewards/accuracies") < 0.5
    assert last(shuffled, "val/loss") == pytest.approx(math.log(2), abs=0.02)
    assert abs(last(shuffled, "val/rewards/margins")) < 0.05 < last(right, "val/rewards/margins")


def test_validation_counts_what_evaluation_counts(folder: Path, train: Train) -> None:
    """Perplexity and bits per byte; float32, and rows of one length."""
    run = [*STAGES["pretrain"], *RUN, "max_steps=1", "data.val=text.jsonl", "trainer.precision=32-true"]
    run_dir = train("validated", *run)
    model, tokenizer = load_for_inference(run_dir / "model"), Tokenizer.from_folder(run_dir / "model")
    expected = evaluate(model, tokenizer, str(folder / "text.jsonl"), sequence_length=127)
    assert last(run_dir, "val/loss") == pytest.approx(expected["nll"], rel=1e-4)
    assert last(run_dir, "val/perplexity") == pytest.approx(expected["perplexity"], rel=1e-3)
    assert last(run_dir, "val/bits_per_byte") == pytest.approx(expected["bits_per_byte"], rel=1e-4)


def test_codes_flip_where_weights_move_and_nowhere_else(train: Train) -> None:
    common = [
        *STAGES["pretrain"],
        *RUN,
        "health_every=1",
        "max_steps=2",
        "schedule=constant",
        "schedule.warmup_steps=0",
    ]
    assert last(train("moves", *common, "schedule.peak_lr=1e-2"), "health/flip_rate") > 0.0
    assert last(train("stands", *common, "schedule.peak_lr=0.0"), "health/flip_rate") == 0.0


def test_without_quantisation_there_is_no_ternary_health(train: Train) -> None:
    dense = train(
        "dense",
        "+recipe=pretrain",
        *RUN,
        *FRESH,
        "model.quantize=false",
        "data.train=text.jsonl",
        "health_every=1",
        "max_steps=2",
    )
    assert not [name for event in metrics(dense) for name in event if name.startswith("health/")]
    assert all("train/loss" in event for event in metrics(dense))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon", "custom"])
def test_every_optimizer_resumes_to_the_same_bytes(folder: Path, train: Train, optimizer: str) -> None:
    run = [*STAGES["pretrain"], *RUN, f"optimizer={optimizer}", "max_steps=6", "checkpoint_every=3", "health_every=2"]
    whole = train(f"{optimizer}-whole", *run)
    halved = shutil.copytree(whole, folder / f"{optimizer}-halved", symlinks=True)
    shutil.rmtree(halved / "checkpoints/step-000006")
    shutil.rmtree(halved / "model")
    train(halved.name, *run)
    assert not torch.equal(change(folder, whole), torch.zeros_like(change(folder, whole)))
    assert torch.equal(change(folder, halved), change(folder, whole))
    assert [event["train/loss"] for event in metrics(halved)] == [event["train/loss"] for event in metrics(whole)]
    assert last(halved, "health/flip_rate") == last(whole, "health/flip_rate")


SMALL = {
    "pretrain": [*FRESH, "data.train=text.jsonl"],
    "pretrain-2b4t": [*FRESH, "data.train=text.jsonl"],
    "long-context": [
        "init_from=base",
        "data.train=text.jsonl",
        "model.max_position_embeddings=256",
        "stage.position_buckets=[32,64]",
    ],
    "sft": ["init_from=base", "data.train=chat.jsonl"],
    "dpo": ["init_from=base", "data.train=pairs.jsonl"],
    "quickstart-pretrain": [*FRESH, "data.train=text.jsonl", "data.val=null"],
    "quickstart-sft": ["init_from=base", "data.sequence_length=127", "data.train=chat.jsonl", "data.val=null"],
    "quickstart-dpo": ["init_from=base", "data.sequence_length=127", "data.train=pairs.jsonl", "data.val=null"],
}


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_runs_small(train: Train, recipe: str) -> None:
    few = [
        "trainer=cpu",
        "data.cache_dir=cache",
        "max_steps=2",
        "global_batch_size=2",
        "micro_batch_size=1",
        "log_every=1",
    ]
    run_dir = train(f"small-{recipe}", f"+recipe={recipe}", *few, *SMALL[recipe])
    assert len([event for event in metrics(run_dir) if "train/loss" in event]) == 2
