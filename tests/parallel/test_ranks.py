"""Two processes do what one does: DDP, FSDP2 and FSDP2 with codes on the wire, for all three stages.

Shards are uneven: 385 rows of the embedding, 255 of the feed-forward matrices. float32 products.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitnet_train.export.source import open_source
from bitnet_train.model.weights import whole
from tests.group import Groups, Job
from tests.runs import metrics
from tests.support import chat_rows, preference_rows, text_rows, tiny_tokenizer, write_jsonl

STEPS, SAVED, STOPPED = 20, 7, 14  # of a run; of the checkpoint that others go on from, and where they stop
RUN = [
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "model=tiny",
    "model.vocab_size=385",
    "model.hidden_size=64",
    "model.intermediate_size=255",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=128",
    "data.sequence_length=63",
    "data.tokenizer=tokenizer",
    "data.cache_dir=cache",
    "data.val=null",
    "global_batch_size=8",
    "val_every=1000",
    "log_every=1",
    "checkpoint_every=1000",
    "health_every=10",
    "max_epochs=null",
    "schedule.warmup_steps=2",
]
STAGES = {
    "pretrain": ["+recipe=pretrain", "data.train=text.jsonl"],
    "sft": ["+recipe=sft", "data.train=chat.jsonl", "init_from=null"],
    "dpo": ["+recipe=dpo", "data.train=pairs.jsonl", "init_from=null"],
}
WAYS = {
    "ddp": ["trainer=auto"],
    "fsdp": ["trainer=fsdp"],
    "low_bit": ["trainer=fsdp", "execution.low_bit_gather=true"],
}
SGD = ["optimizer=custom", "optimizer._target_=torch.optim.SGD", "optimizer.grad_clip=0"]
ONCE = ["max_steps=1", "schedule.peak_lr=1.0", "schedule.warmup_steps=0", "schedule.peak_weight_decay=0.0", *SGD]
COMPOSED = {
    "full": ["execution.activation_checkpointing=full"],
    "selective": ["execution.activation_checkpointing=selective", "execution.low_bit_gather=true"],
    "compiled": ["execution.compile=true", "execution.low_bit_gather=true"],
}
HARMED = {"ddp": 0, "fsdp": 1}  # one of the ranks that write checkpoints
CUTS = {"ddp": (1, 4), "fsdp": (2,)}  # rows of a micro-batch of two ranks; a single process takes all 8 at once


def job(name: str, stage: str, ranks: int, *overrides: str) -> Job:
    return Job(name, [*STAGES[stage], *RUN, *overrides, f"trainer.devices={ranks}"])


def steps(stage: str, way: str, ranks: int = 2) -> Job:
    """A run of twenty steps. With a small eps, AdamW takes whole steps where a gradient is nothing but rounding."""
    options = [f"max_steps={STEPS}", "micro_batch_size=2", "schedule.peak_lr=1e-4", "optimizer.eps=1e-4", *WAYS[way]]
    return job(f"{way}-{stage}-{ranks}", stage, ranks, *options)


def once(stage: str, way: str, size: int, ranks: int = 2) -> Job:
    """One step of SGD at rate 1, in micro-batches of `size` rows: the change of the weights is the gradient."""
    return job(f"once-{way}-{stage}-{ranks}x{size}", stage, ranks, *ONCE, *WAYS[way], f"micro_batch_size={size}")


def saving(name: str, way: str, ranks: int, copy_of: str | None = None, fault: str | None = None) -> Job:
    """A run of pretrain that saves twice, or the rest of one that was killed after its first checkpoint."""
    callback = f"+callbacks.harm={fault}" if fault else "+callbacks.record._target_=tests.group.Record"
    length = [f"max_steps={STOPPED}", f"checkpoint_every={SAVED}", "keep_last=0"]
    whole = job(name, "pretrain", ranks, *length, "micro_batch_size=1", callback, *WAYS[way])
    return Job(name, whole.overrides, copy_of, without=None if copy_of is None else SAVED + 1, fails=fault is not None)


def composed(name: str) -> Job:
    """The same with an option of execution, with sharded weights."""
    return job(f"once-{name}", "pretrain", 2, *ONCE, *WAYS["fsdp"], *COMPOSED[name], "micro_batch_size=2")


def muon(way: str, copy_of: str | None = None) -> Job:
    """Two steps of Muon, or the second of them."""
    options = ["max_steps=2", "schedule.peak_lr=1e-2", "schedule.warmup_steps=0", "schedule.peak_weight_decay=0.0"]
    saves = ["micro_batch_size=2", "optimizer=muon", "checkpoint_every=1", "keep_last=0", *WAYS[way]]
    whole = job(f"muon-{way}", "pretrain", 2, *options, *saves)
    return Job(f"again-muon-{way}", whole.overrides, copy_of, without=2) if copy_of else whole


def harmed(way: str, rank: int) -> list[Job]:
    """Runs that go on from the checkpoint: a step of no numbers, a disk that stays full, and then nothing more."""
    nan = f"{{_target_: tests.faults.NotANumber, step: {SAVED + 1}, rank: {rank}}}"
    full = f"{{_target_: tests.faults.FullDisk, first: {SAVED + 1}, last: 99, rank: {rank}}}"
    return [
        saving(f"nan-{way}", way, 2, f"whole-{way}", nan),
        saving(f"full-{way}", way, 2, f"nan-{way}", full),
        saving(f"mended-{way}", way, 2, f"full-{way}"),
    ]


STEPPED = [
    *(steps(stage, way) for stage in STAGES for way in WAYS),
    *(once(stage, way, size) for stage in STAGES for way in CUTS for size in CUTS[way]),
    *(composed(name) for name in COMPOSED),
    *(muon(way) for way in WAYS),
    muon("fsdp", copy_of="muon-fsdp"),
]
ALONE = [
    *(steps(stage, "ddp", 1) for stage in STAGES),
    *(once(stage, "ddp", 8, 1) for stage in STAGES),
    job("start", "pretrain", 1, *ONCE, "trainer=auto", "micro_batch_size=8", "schedule.peak_lr=0.0"),
]
SAVING = [
    *(saving(f"whole-{way}", way, 2) for way in WAYS),
    *(saving(f"again-{way}", way, 2, f"whole-{way}") for way in WAYS),
    saving("ddp-to-fsdp", "fsdp", 2, "whole-ddp"),
    *(job for way, rank in HARMED.items() for job in harmed(way, rank)),
]
MOVED = {
    1: [saving("fsdp-to-one", "fsdp", 1, "whole-fsdp")],
    4: [saving("two-to-four", "low_bit", 4, "whole-fsdp")],
    2: [saving("four-to-two", "fsdp", 2, "two-to-four"), saving("one-to-two", "fsdp", 2, "fsdp-to-one")],
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tokenizer").mkdir()
    tiny_tokenizer().save(folder / "tokenizer")
    for name, rows in {"text": text_rows(60), "chat": chat_rows(24), "pairs": preference_rows(24)}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    with Groups(folder) as groups:
        yield groups


@pytest.fixture(scope="module")
def folder(groups: Groups) -> Path:
    """Runs of some steps, of two ranks and of one."""
    groups.do(2, STEPPED)
    groups.do(1, ALONE)
    return groups.folder


@pytest.fixture(scope="module")
def saved(groups: Groups) -> Path:
    """Runs of two ranks that save, go on, and are harmed."""
    groups.do(2, SAVING)
    return groups.folder


@pytest.fixture(scope="module")
def moved(groups: Groups, saved: Path) -> Path:
    """Runs that go on with another number of ranks."""
    for count, jobs in MOVED.items():
        groups.do(count, jobs)
    return saved


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model/model.safetensors")


def vector(run_dir: Path) -> Tensor:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(weights(run_dir).items())])


def logged(run_dir: Path, name: str) -> list[float]:
    return [event[name] for event in metrics(run_dir) if name in event]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_twenty_steps_of_two_ranks_are_those_of_one(folder: Path, stage: str, way: str) -> None:
    """But for a last bit of a sum, which now and then is another int8 code: how often depends on the processor."""
    alone, two = folder / f"ddp-{stage}-1", folder / f"{way}-{stage}-2"
    assert logged(two, "train/loss") == pytest.approx(logged(alone, "train/loss"), rel=1e-3)
    assert logged(two, "train/loss")[0] == pytest.approx(logged(alone, "train/loss")[0], rel=1e-6)
    assert len(logged(two, "train/loss")) == STEPS
    assert (vector(two) - vector(alone)).norm() < 1e-3 * (vector(alone) - vector(folder / "start")).norm()


@pytest.mark.parametrize("stage", STAGES)
def test_codes_on_the_wire_change_no_bit(folder: Path, stage: str) -> None:
    masters, codes = folder / f"fsdp-{stage}-2", folder / f"low_bit-{stage}-2"
    assert logged(codes, "train/loss") == logged(masters, "train/loss")
    assert torch.equal(vector(codes), vector(masters))


@pytest.mark.parametrize("name", ["minus", "flip_rate", "threshold_distance", "scale"])
def test_health_is_measured_over_all_shards(folder: Path, name: str) -> None:
    alone, two = folder / "ddp-pretrain-1", folder / "low_bit-pretrain-2"
    assert logged(two, f"health/layers.1/{name}") == pytest.approx(logged(alone, f"health/layers.1/{name}"), rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_and_ranks_cut_a_batch_without_a_trace(folder: Path, stage: str) -> None:
    """Rows of pretrain and sft are packed, those of dpo are not. 1e-6 of the gradient's norm."""
    alone = folder / once(stage, "ddp", 8, ranks=1).run_dir
    gradient = vector(alone) - vector(folder / "start")
    assert gradient.norm() > 0.01
    for way, sizes in CUTS.items():
        for size in sizes:
            two = folder / once(stage, way, size).run_dir
            assert (vector(two) - vector(alone)).norm() < 1e-6 * gradient.norm()
            for name in ("train/loss", "train/grad_norm"):
                assert logged(two, name) == pytest.approx(logged(alone, name), rel=1e-6)


@pytest.mark.parametrize("name", ["full", "selective"])
def test_what_is_computed_again_is_computed_from_the_same_shards(folder: Path, name: str) -> None:
    plain = folder / once("pretrain", "fsdp", 2).run_dir
    assert torch.equal(vector(folder / f"once-{name}"), vector(plain))


def test_compiled_layers_compute_with_gathered_shards(folder: Path) -> None:
    """A sum in another order moves a scale by its last bit, and that now and then a code."""
    plain = vector(folder / once("pretrain", "fsdp", 2).run_dir)
    gradient = plain - vector(folder / "start")
    change = (vector(folder / "once-compiled") - plain).norm()
    assert 0 < change < 1e-3 * gradient.norm()  # none: nothing was compiled


@pytest.mark.parametrize("way", ["fsdp", "low_bit"])
def test_muon_orthogonalises_sharded_matrices_as_whole_ones(folder: Path, way: str) -> None:
    """In bfloat16: of these matrices either result is some 5 % off that of float64."""
    start = weights(folder / "start")
    alone, sharded = weights(folder / "muon-ddp"), weights(folder / f"muon-{way}")
    for name, weight in alone.items():
        assert (sharded[name] - weight).norm() < 0.2 * (weight - start[name]).norm()


def test_muon_goes_on_from_shards_bit_for_bit(folder: Path) -> None:
    assert torch.equal(vector(folder / "again-muon-fsdp"), vector(folder / "muon-fsdp"))


@pytest.mark.fault
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_bit_for_bit(saved: Path, way: str) -> None:
    whole, again = saved / f"whole-{way}", saved / f"again-{way}"
    assert logged(again, "train/loss") == logged(whole, "train/loss")
    assert logged(again, "health/flip_rate") == logged(whole, "health/flip_rate")
    assert torch.equal(vector(again), vector(whole))


def failures(run_dir: Path) -> list[str]:
    return [(run_dir / f"failure-{rank}").read_text() for rank in range(2)]


@pytest.mark.fault
@pytest.mark.parametrize("way", HARMED)
def test_no_rank_makes_an_update_of_what_another_could_not_compute(saved: Path, way: str) -> None:
    first, second = failures(saved / f"nan-{way}")
    assert first == second
    assert f"step {SAVED + 1}: the loss of rank {HARMED[way]}, micro-batch 0 is nan (samples " in first
    assert {path.name for path in (saved / f"nan-{way}/checkpoints").glob("step-*")} == {f"step-{SAVED:06}"}


@pytest.mark.fault
@pytest.mark.parametrize("way", HARMED)
def test_a_disk_that_is_full_for_one_rank_costs_checkpoints_and_nothing_else(saved: Path, way: str) -> None:
    harmed, mended = saved / f"full-{way}", saved / f"mended-{way}"
    first, second = failures(harmed)
    assert first == second
    assert "the run has come to its end, but not all of it could be written: File too large" in first
    assert {path.name for path in (harmed / "checkpoints").iterdir()} == {f"step-{SAVED:06}", "last"}
    assert (harmed / "model").exists() == (HARMED[way] != 0)  # the first rank writes the result
    assert logged(harmed, "train/loss") == logged(saved / f"whole-{way}", "train/loss")
    assert torch.equal(vector(mended), vector(saved / f"whole-{way}"))
    assert logged(mended, "train/loss") == logged(saved / f"whole-{way}", "train/loss")


def rows(run_dir: Path) -> list[list[list[int]]]:
    """The rows of every step after the checkpoint, sorted: ranks deal them out among themselves."""
    lines = [json.loads(line) for file in run_dir.glob("rows-*") for line in file.read_text().splitlines()]
    return [sorted(row for step, ids in lines if step == number for row in ids) for number in range(SAVED, STOPPED)]


@pytest.mark.parametrize("other", ["fsdp-to-one", "two-to-four", "four-to-two", "one-to-two"])
def test_other_numbers_of_ranks_read_the_same_state_and_the_same_samples(moved: Path, other: str) -> None:
    """A digest of all weights and moments where the run goes on; more than 50 samples after it."""
    whole, went_on = moved / "again-fsdp", moved / other
    assert (went_on / "digest").read_text() == (whole / "digest").read_text()
    assert rows(went_on) == rows(whole)
    assert sum(len(step) for step in rows(whole)) > 50
    assert logged(went_on, "train/loss") == pytest.approx(logged(whole, "train/loss"), rel=1e-3)


def test_a_sharded_run_takes_the_checkpoint_of_a_whole_one(saved: Path) -> None:
    assert (saved / "ddp-to-fsdp/digest").read_text() == (saved / "again-ddp/digest").read_text()


def test_a_sharded_checkpoint_is_exported_as_the_result_is(saved: Path) -> None:
    source = open_source(saved / "whole-fsdp/checkpoints/last")
    for name, tensor in weights(saved / "whole-fsdp").items():
        assert torch.equal(whole(source.weights, name), tensor)
