"""TensorBoard and W&B hold what metrics.jsonl holds; samples, reports and curves are written."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.training.health import NAMES
from tests.forked import python
from tests.runs import Train, metrics, trainer_in
from tests.support import ROOT, TINY_PRETRAIN, write_corpus

wandb_messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")

RUN = [*TINY_PRETRAIN, "max_steps=4", "val_every=2", "health_every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("logging"), rows=30)


@pytest.fixture
def train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return trainer_in(folder, monkeypatch)


def logged(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every value of metrics.jsonl by name and step; the clock of a step is not part of its name."""
    return {(name, int(event["step"])): v for event in metrics(run_dir) for name, v in event.items() if name != "step"}


def test_tensorboard_holds_what_metrics_jsonl_holds(train: Train) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = train("tensorboard", *RUN, "logger=tensorboard")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    seen = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert {"val/bits_per_byte", "val/perplexity", "health/zero", "health/layers.0/flip_rate"} <= {n for n, _ in seen}
    assert seen == pytest.approx(logged(run_dir), rel=1e-6)  # TensorBoard keeps float32


def test_wandb_holds_what_metrics_jsonl_holds(train: Train) -> None:
    run_dir = train("wandb", *RUN, "logger=wandb")
    (file,) = run_dir.rglob("*.wandb")
    assert wandb_values(file) == pytest.approx(logged(run_dir))
    train("wandb", *RUN, "max_steps=5", "resume_allow=[max_steps,schedule]", "logger=wandb")
    runs = [run for file in run_dir.rglob("*.wandb") for run in wandb_runs(file)]
    assert len(runs) == 2
    assert {run.run_id for run in runs} == {(run_dir / "wandb-id.txt").read_text().strip()}
    assert {run.display_name for run in runs} == {f"quickstart-pretrain-{run_dir.parent.name}-wandb"}
    steps = [json.loads(entry.value_json) for run in runs for entry in run.config.update if entry.key == "max_steps"]
    assert sorted(steps) == [4, 5]


def wandb_runs(file: Path) -> Iterator[Any]:
    """How a run was begun: its name, id and configuration."""
    for data in wandb_records(file):
        record = wandb_messages.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            yield record.run


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KB in the format of LevelDB's log."""
    content, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = -position % 32768
        if 0 < room < 7:  # the rest of a block that is too short for a header
            position += room
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_values(file: Path) -> dict[tuple[str, int], float]:
    """Every value of an offline run by name and step."""
    values = {}
    for data in wandb_records(file):
        record = wandb_messages.Record()
        record.ParseFromString(data)
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name, value in items.items():
            if not name.startswith(("_", "trainer/")):
                values[name, int(items["trainer/global_step"])] = float(value)
    return values


def test_samples_are_written_at_every_validation(train: Train) -> None:
    run_dir = train(
        "samples",
        *RUN,
        "callbacks=samples",
        "callbacks.samples.prompts=[fox,dog]",
        "callbacks.samples.max_new_tokens=4",
    )
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (s, p) for s in (0, 2, 4) for p in ("fox", "dog")
    ]
    assert all(sample["text"] for sample in samples)


def test_a_report_shows_every_curve_and_every_layer(folder: Path, train: Train) -> None:
    pytest.importorskip("matplotlib")
    run_dir = train("report", *RUN)
    result = python(str(ROOT / "tools/report.py"), "report", cwd=folder)
    assert result.returncode == 0, result.stderr
    page = (run_dir / "report.html").read_text()
    titles = set(re.findall("<h2>(.*?)</h2>", page))
    assert {"Loss, nats", "Learning rate", "Weight decay", "Tokens per second", "Share of the codes"} <= titles
    assert {f"Every layer: {name.replace('_', ' ')}" for name in NAMES} <= titles
    assert page.count("<svg") == len(titles)
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace('xlink:href="data:', ""))  # nothing from elsewhere


def test_a_report_of_what_is_no_run_is_refused(folder: Path) -> None:
    result = python(str(ROOT / "tools/report.py"), "tokenizer", cwd=folder)
    assert (result.returncode, result.stderr) == (2, "error: tokenizer: no metrics.jsonl; give a run directory\n")


def test_the_schedule_of_a_recipe_is_drawn(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    result = python(str(ROOT / "tools/plot_schedule.py"), "+recipe=pretrain", "max_steps=1000", "out.png", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_of_unknown_length_is_refused(folder: Path) -> None:
    result = python(str(ROOT / "tools/plot_schedule.py"), "+recipe=sft", cwd=folder)
    assert result.returncode == 2
    assert "add max_steps=N" in result.stderr
