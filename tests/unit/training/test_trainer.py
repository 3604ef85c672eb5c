"""Lightning's options: each one works, or is refused with the key that takes its place."""

import inspect
import math

import lightning as L
import pytest
from omegaconf import OmegaConf

from bitnet_train.errors import UserError
from bitnet_train.training import trainer
from bitnet_train.training.trainer import check_options

WORKING = {  # what Lightning says holds here
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "limit_val_batches", "deterministic"),
    *("benchmark", "inference_mode", "profiler", "detect_anomaly", "sync_batchnorm", "enable_autolog_hparams"),
    "max_time",
}


def test_every_option_is_decided() -> None:
    options = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert WORKING | trainer._OWN.keys() == options
    assert not WORKING & trainer._OWN.keys()


@pytest.mark.parametrize("name", trainer._OWN)
def test_what_the_run_decides_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.{name} is set by the run itself; leave it out, and use \w"):
        check_options(OmegaConf.create({name: None}))


def test_what_works_is_not() -> None:
    check_options(OmegaConf.create(dict.fromkeys(WORKING - {"max_time"}, True)))


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, math.inf), ("00:00:00:05", 5), ("01:00:00:00", 86400), ({"minutes": 2}, 120)]
)
def test_the_time_of_a_run(given: object, seconds: float) -> None:
    assert trainer._max_time(OmegaConf.create({"max_time": given})) == seconds


@pytest.mark.parametrize(
    "given", ["soon", "00:05", 5, [1], {"minute": 5}, {"minutes": "x"}, {"days": 10**12}, "00:00:00:00", {"hours": -1}]
)
def test_what_is_no_time_is_refused(given: object) -> None:
    with pytest.raises(UserError, match=r"^trainer\.max_time must be DD:HH:MM:SS"):
        check_options(OmegaConf.create({"max_time": given}))
