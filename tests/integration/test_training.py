"""Runs as users start them: the three stages in a row, a kill in the middle, a stop on request, bad input."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bitnet_train.cli import main
from bitnet_train.formats.hf_folder import HFFolder
from bitnet_train.model.pretrained import load_for_inference
from tests import support
from tests.forked import start
from tests.runs import train
from tests.support import (
    TINY_PRETRAIN,
    chat_rows,
    preference_rows,
    text_rows,
    write_corpus,
    write_jsonl,
)

PRETRAIN = [
    *TINY_PRETRAIN,
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.val=null",
    "max_steps=12",
    "checkpoint_every=3",
    "health_every=2",
    "val_every=5",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and rows of every kind; runs are started in it."""
    folder = write_corpus(tmp_path_factory.mktemp("data"))
    write_jsonl(folder / "other.jsonl", [*text_rows(100)[60:], {"text": None}])
    write_jsonl(folder / "chat.jsonl", chat_rows(24))
    write_jsonl(folder / "pairs.jsonl", preference_rows(24))
    return folder


@pytest.fixture(scope="module")
def pretrained(data: Path) -> Path:
    """An uninterrupted pre-training run."""
    result = support.train(*PRETRAIN, "run_dir=whole", cwd=data)
    assert result.returncode == 0, result.stdout + result.stderr
    return data / "whole"


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def status(run_dir: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run_dir / "status.json").read_text())
    return content


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(
            f'"step": {step},' in line for line in (run_dir / "metrics.jsonl").open()
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"{run_dir}: step {step} was not reached")


def same_model(left: Path, right: Path) -> bool:
    return (left / "model/model.safetensors").read_bytes() == (right / "model/model.safetensors").read_bytes()


def without_rates(events: list[dict[str, float]]) -> list[dict[str, float]]:
    """What a resumed run must repeat: all but what depends on the clock."""
    clocked = ("tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gb", "data_wait")
    return [{k: v for k, v in event.items() if k.removeprefix("train/") not in clocked} for event in events]


def test_a_run_leaves_what_the_interface_promises(pretrained: Path) -> None:
    assert status(pretrained) == {"state": "done", "step": 12, "reason": ""}
    assert {path.name for path in (pretrained / ".hydra").iterdir()} >= {"config.yaml", "overrides.yaml"}
    assert [event["step"] for event in metrics(pretrained)] == list(range(1, 13))
    assert {path.name for path in (pretrained / "checkpoints").iterdir()} == {"step-000009", "step-000012", "last"}
    names = {path.name for path in (pretrained / "model").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    }
    folder = HFFolder(pretrained / "model")
    assert folder.config["quantization_config"]["quantization_mode"] == "online"
    assert len(folder.tensors) == 2 * 11 + 2
    losses = [event["train/loss"] for event in metrics(pretrained)]
    assert losses[-1] < losses[0] - 0.5


def test_a_run_that_is_done_does_nothing_more(data: Path, pretrained: Path) -> None:
    before = (pretrained / "metrics.jsonl").read_bytes()
    assert train(*PRETRAIN, "run_dir=whole", cwd=data).returncode == 0
    assert (pretrained / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault
@pytest.mark.parametrize("step", [4, 9])
def test_killed_and_started_again_it_ends_with_the_same_bytes(data: Path, pretrained: Path, step: int) -> None:
    run_dir = data / f"killed-{step}"
    process = start(*PRETRAIN, f"run_dir={run_dir.name}", cwd=data, log=data / "log")
    wait_for_step(run_dir, step)
    process.kill()
    process.join()
    assert not (run_dir / "model").exists()
    assert train(*PRETRAIN, f"run_dir={run_dir.name}", cwd=data).returncode == 0
    assert same_model(run_dir, pretrained)
    assert without_rates(metrics(run_dir)) == without_rates(metrics(pretrained))


@pytest.mark.fault
@pytest.mark.parametrize("how", ["SIGTERM", "STOP"])
def test_stopped_on_request_it_saves_and_goes_on(data: Path, pretrained: Path, how: str) -> None:
    run_dir = data / f"stopped-{how}"
    process = start(*PRETRAIN, f"run_dir={run_dir.name}", "checkpoint_every=1000", cwd=data, log=data / "log")
    wait_for_step(run_dir, 4)
    if how == "STOP":
        (run_dir / "STOP").touch()
    else:
        process.terminate()
    process.join(60)
    assert process.exitcode == 85, (data / "log").read_text()
    stopped = status(run_dir)
    assert stopped["state"] == "requeue"
    assert (run_dir / f"checkpoints/step-{stopped['step']:06}").is_dir()
    assert train(*PRETRAIN, f"run_dir={run_dir.name}", cwd=data).returncode == 0
    assert same_model(run_dir, pretrained)


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_set_aside(data: Path, pretrained: Path, damage: str) -> None:
    run_dir = data / f"damaged-{damage}"
    assert train(*PRETRAIN, f"run_dir={run_dir.name}", "max_steps=12", cwd=data).returncode == 0
    file = run_dir / "checkpoints/step-000012/state.pt"
    content = bytearray(file.read_bytes())
    content = content[:-100] if damage == "cut" else content
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (run_dir / "model/model.safetensors").unlink()
    assert train(*PRETRAIN, f"run_dir={run_dir.name}", cwd=data).returncode == 0
    assert same_model(run_dir, pretrained)
    assert (run_dir / "checkpoints/step-000012.bad").is_dir()


@pytest.mark.fault
def test_another_run_is_not_resumed(data: Path, pretrained: Path) -> None:
    changed = ["seed=1", "global_batch_size=8", "quantization_warmup_steps=5"]
    result = train(*PRETRAIN, "run_dir=whole", *changed, cwd=data)
    assert result.returncode == 2
    assert "seed: 0 there, 1 now" in result.stderr
    assert "global_batch_size: 4 there, 8 now" in result.stderr
    assert "quantization_warmup_steps: 0 there, 5 now" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert status(pretrained)["state"] == "done"


def test_starting_anew_does_not_end_in_the_old_run(data: Path, pretrained: Path) -> None:
    run_dir = data / "anew"
    assert train(*PRETRAIN, "run_dir=anew", "max_steps=6", "schedule.warmup_steps=1", cwd=data).returncode == 0
    process = start(*PRETRAIN, "run_dir=anew", "resume=never", cwd=data, log=data / "log")
    wait_for_step(run_dir, 8)
    process.kill()
    process.join()
    assert {path.name for path in (run_dir / "checkpoints").glob("*.old")} == {"step-000003.old", "step-000006.old"}
    assert train(*PRETRAIN, "run_dir=anew", cwd=data).returncode == 0
    assert same_model(run_dir, pretrained)


@pytest.mark.fault
def test_two_runs_in_one_directory_are_refused(data: Path) -> None:
    first = start(*PRETRAIN, "run_dir=shared", "max_steps=400", cwd=data, log=data / "log")
    wait_for_step(data / "shared", 1)
    second = train(*PRETRAIN, "run_dir=shared", "max_steps=400", cwd=data)
    first.kill()
    first.join()
    assert second.returncode == 2
    assert "another run is at work there" in second.stderr


def test_sft_and_dpo_go_on_from_the_stage_before(data: Path, pretrained: Path) -> None:
    common = [
        "trainer=cpu",
        "max_steps=4",
        "log_every=1",
        "val_every=2",
        "data.sequence_length=127",
        "global_batch_size=4",
    ]
    sft = train(
        "recipe=quickstart-sft", *common, "init_from=whole", "run_dir=sft", "data.train=chat.jsonl",
        "data.val=chat.jsonl", "micro_batch_size=2", cwd=data,
    )  # fmt: skip
    assert sft.returncode == 0, sft.stdout + sft.stderr
    dpo = train(
        "+recipe=quickstart-dpo", *common, "init_from=sft", "run_dir=dpo", "data.train=pairs.jsonl",
        "data.val=pairs.jsonl", "data.cache_dir=cache", "micro_batch_size=4", cwd=data,
    )  # fmt: skip
    assert dpo.returncode == 0, dpo.stdout + dpo.stderr
    first = metrics(data / "dpo")[0]
    assert first["step"] == 0
    assert first["val/rewards/margins"] == pytest.approx(0.0, abs=1e-3)  # policy and reference are the same still
    assert first["val/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert len(list((data / "cache").glob("reference-*.safetensors"))) == 1  # train and val are the same pairs
    assert load_for_inference(data / "dpo/model").config == load_for_inference(pretrained / "model").config


def test_quantisation_sets_in_over_the_warm_up(data: Path, pretrained: Path) -> None:
    """And computing activations again changes no bit of the result."""
    options = ["quantization_warmup_steps=8", "stage.z_loss=1e-4", "val_every=4"]
    assert train(*PRETRAIN, *options, "run_dir=warm", cwd=data).returncode == 0
    strengths = [event["train/quantization_strength"] for event in metrics(data / "warm") if "train/loss" in event]
    assert strengths == [min(1.0, step / 8) for step in range(12)]
    assert metrics(data / "warm")[0]["train/loss"] != metrics(pretrained)[0]["train/loss"]
    again = [*PRETRAIN, *options, "execution.activation_checkpointing=full", "run_dir=warm-again"]
    assert train(*again, cwd=data).returncode == 0
    assert same_model(data / "warm-again", data / "warm")


def test_a_mixture_and_named_validation_sets_have_figures_of_their_own(data: Path) -> None:
    result = train(
        *PRETRAIN, "run_dir=named", "max_steps=4", "log_every=2", "val_every=4", "data.bad_rows=skip",
        "data.train=[{path:text.jsonl,weight:1},{path:other.jsonl,weight:1}]",
        "data.val={seen:text.jsonl,other:[other.jsonl]}", cwd=data,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "data: other.jsonl: 1 of 41 rows are bad and were skipped: other.jsonl:41: " in result.stderr
    events = metrics(data / "named")
    figures = [event for event in events if "val/seen/loss" in event]
    assert [event["step"] for event in figures] == [0, 4]
    assert all(event["val/other/loss"] != event["val/seen/loss"] for event in figures)
    assert not any("val/loss" in event for event in events)
    shares = [(e["train/share/text.jsonl"], e["train/share/other.jsonl"]) for e in events if "train/loss" in e]
    assert len(shares) == 2
    assert all(sum(pair) == pytest.approx(1.0) and 0.0 < pair[0] < 1.0 for pair in shares)


def test_a_dry_run_trains_nothing(data: Path) -> None:
    result = train(*PRETRAIN, "run_dir=dry", "dry_run=true", cwd=data)
    assert result.returncode == 0
    assert "12 steps of 4 rows" in result.stdout
    assert not (data / "dry/checkpoints").exists()
    assert not (data / "dry/model").exists()


BAD_INPUT = {
    "+recipe=nope": "unknown recipe 'nope'; the recipes are ",
    "nonsense=1": "unknown key nonsense",
    "global_batch_sze=1": "did you mean global_batch_size?",
    "data.train=größe.jsonl": "data.train=größe.jsonl: a text with other signs",
    "seed=99999999999999999999": "seed must lie between -2^62 and 2^62",
    "max_epochs=inf": "max_epochs must be a number above 0, got inf",
    "model.foo=99999999999999999999": "unknown key model.foo",
    "global_batch_size=1000000000000": "global_batch_size must be at most 1000 times",
    "stage._target_=os.system": "stage._target_ must name a dataclass of this package, got 'os.system'",
    "+callbacks.x._target_=os.makedirs": "callbacks.x._target_ must name a class of the kind lightning",
    "+nonsense=1": "unknown key nonsense",
    "optimizer.betas=[0.9,2]": "optimizer.betas must lie in [0, 1)",
    "max_steps=many": "max_steps",
    "quantization_warmup_steps=-1": "quantization_warmup_steps must be at least 0, got -1",
    "execution.attention=flash": "execution.attention must be one of auto, sdpa, got 'flash'",
    "stage.z_loss=-1": "stage.z_loss must be at least 0, got -1.0",
    "data.train=nothing-*.jsonl": "nothing-*.jsonl",
    "data.train=empty.jsonl": "empty.jsonl",
    "data.train=broken.jsonl": "broken.jsonl:2: ",
    "data.train=null": "data.train is not set",
    "data.tokenizer=empty": "no tokenizer.json",
    "init_from=empty": "init_from=empty: no model there",
    "data.sequence_length=129": "max_position_embeddings (128), got 129",
    "model.num_attention_heads=3": "model.num_attention_heads (3), got 128",
    "micro_batch_size=3": "global_batch_size must be a multiple",
    "trainer.precision=bf16-true": "trainer.precision must be bf16-mixed or 32-true",
    "+trainer.foo=1": "foo",
    "+trainer.max_steps=9": "trainer.max_steps is set by the run itself; leave it out, and use max_steps",
    "+trainer.gradient_clip_val=0.5": "leave it out, and use optimizer.grad_clip",
    "+trainer.max_time=5": "trainer.max_time must be DD:HH:MM:SS or {minutes: N}, and above 0, got 5",
    "trainer=gpu": "gpu",
    "optimizer.betas=[0.9]": "optimizer.betas must lie in [0, 1) and be two",
    "stage=dpo": "stage DirectPreference does not read TextData",
    "stage.reduction=avg": "stage.reduction must be mean or sum, got 'avg'",
    "data.num_workers=-1": "data.num_workers must be at least 0",
    "trainer.devices=0": "trainer.devices must be a number of at least 1, or auto, got 0",
    "resume=nowhere": "resume=nowhere: no checkpoint there",
}


@pytest.fixture(scope="module")
def bad(data: Path) -> Path:
    (data / "empty.jsonl").touch()
    (data / "empty").mkdir()
    (data / "broken.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    return data


@pytest.mark.parametrize("override", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(
    bad: Path, override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where nothing has to be imported again; the exit code is what `sys.exit` gets."""
    rest = PRETRAIN[1:] if override.startswith("+recipe") else PRETRAIN
    monkeypatch.chdir(bad)
    monkeypatch.setattr(sys, "argv", ["bitnet-train", *rest, "run_dir=bad", override])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert BAD_INPUT[override] in error
    assert not (bad / "bad/checkpoints").exists()


@pytest.mark.fault
def test_a_run_whose_time_is_over_stops_with_its_state_saved(data: Path) -> None:
    """Lightning's own way is to end in the middle of a step, and well."""
    result = train(*PRETRAIN, "run_dir=timed", "max_steps=100000", "+trainer.max_time={seconds: 1}", cwd=data)
    assert result.returncode == 85
    status = json.loads((data / "timed/status.json").read_text())
    assert (status["state"], status["reason"]) == ("requeue", "trainer.max_time")
    assert (data / "timed/checkpoints/last").resolve().name == f"step-{status['step']:06d}"
    assert 0 < status["step"] < 100000


@pytest.mark.fault
def test_a_signal_before_training_is_a_stop_too(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bad)
    monkeypatch.setattr("bitnet_train.training.run.build", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(sys, "argv", ["bitnet-train", *PRETRAIN, "run_dir=early"])
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 85
    assert "stopped (SIGUSR1)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGUSR1) == before


def test_bad_input_ends_the_process_with_2(bad: Path) -> None:
    result = support.train(*PRETRAIN, "run_dir=bad", "data.train=broken.jsonl", cwd=bad)
    assert result.returncode == 2
    assert result.stderr.startswith("error: broken.jsonl:2: ")
    assert len(result.stderr.splitlines()) == 1
