from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import DictConfig, OmegaConf

from bitnet_train.classes import check_object
from bitnet_train.errors import UserError
from bitnet_train.training import objects

SLOW = {"_target_": "tests.steps.Slow", "seconds": 0.5}


def node(values: object) -> DictConfig:
    created = OmegaConf.create({"group": values, "name": "tests.steps.Slow"})
    assert isinstance(created.group, DictConfig)
    return created.group


def test_callbacks_of_ones_own_are_made_and_null_leaves_one_out() -> None:
    made = objects.named(node({"a": SLOW, "b": None, "c": {**SLOW, "_target_": "${name}"}}), "callbacks", L.Callback)
    assert [type(one).__name__ for one in made] == ["Slow", "Slow"]
    assert made[0].seconds == 0.5


def test_loggers_are_made(tmp_path: object) -> None:
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    assert isinstance(objects.named(node({"csv": logger}), "logger", Logger)[0], CSVLogger)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"x": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "p"}},
            "callbacks.x._target_ must name a class",
        ),
        (
            {"x": {"_target_": "numpy.load", "file": "p", "allow_pickle": True}},
            "callbacks.x._target_ must name a class",
        ),
        ({"a": SLOW, "x": {"_target_": "os.makedirs", "name": "made"}}, "callbacks.x._target_ must name a class"),
        ({"x": {**SLOW, "seconds": {"_target_": "time.time"}}}, "callbacks.x.seconds._target_ must not stand there"),
        ({"x": {**SLOW, "_partial_": True}}, "callbacks.x._partial_ must be false"),
        ({"x": 5}, "callbacks.x must have a _target_ and its arguments, got 5"),
    ],
)
def test_nothing_is_called_that_is_no_callback(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        objects.named(node(values), "callbacks", L.Callback)


def trainer(**options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    return objects.trainer(node({"_target_": "lightning.Trainer", **options}), **quiet)


def test_a_trainer_takes_objects_where_lightning_does() -> None:
    profiler = {"_target_": "lightning.pytorch.profilers.SimpleProfiler"}
    strategy = {
        "_target_": "lightning.pytorch.strategies.DDPStrategy",
        "cluster_environment": {"_target_": "lightning.fabric.plugins.environments.LightningEnvironment"},
    }
    check_object({"_target_": "lightning.Trainer", "strategy": strategy}, "trainer", (L.Trainer,), objects._TAKEN)
    made: Any = trainer(profiler=profiler)
    assert isinstance(made.profiler, SimpleProfiler)


def test_a_time_and_a_schedule_are_made_where_an_object_takes_one() -> None:
    hour = {"_target_": "datetime.timedelta", "hours": 1}
    made: Any = trainer(strategy={"_target_": "lightning.pytorch.strategies.DDPStrategy", "timeout": hour})
    assert made.strategy._timeout == timedelta(hours=1)
    schedule = {"_target_": "torch.profiler.schedule", "wait": 1, "warmup": 1, "active": 1}
    made = trainer(profiler={"_target_": "lightning.pytorch.profilers.PyTorchProfiler", "schedule": schedule})
    assert made.profiler._schedule._schedule(2) == torch.profiler.ProfilerAction.RECORD_AND_SAVE
    checkpoint = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "train_time_interval": hour}
    (callback,) = objects.named(node({"x": checkpoint}), "callbacks", L.Callback)
    assert callback._train_time_interval == timedelta(hours=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_target_": "os.system"}, "trainer._target_ must name a class"),
        ({"strategy": {"_target_": "os.makedirs", "name": "x"}}, "trainer.strategy._target_ must name a class"),
        ({"plugins": [{"_target_": "tests.steps.Slow"}]}, "trainer.plugins.0._target_ must name a class"),
        ({"callbacks": [SLOW]}, "trainer.callbacks.0._target_ must not stand there"),
        ({"max_time": {"a": {"_target_": "time.time"}}}, "trainer.max_time.a._target_ must not stand there"),
    ],
)
def test_nothing_is_called_that_a_trainer_does_not_take(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(**options)
