"""The sizes under conf/model: what their headers say, counted without memory."""

import math
from dataclasses import fields

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from bitnet_train.config import CONF_DIR, build
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM

PARAMETERS = {
    "30m": 30_004_864,
    "125m": 123_725_568,
    "700m": 728_839_680,
    "1_3b": 1_280_068_608,
    "2b4t": 2_412_820_480,
    "3b": 3_340_357_504,
}
SIZES = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml") if path.stem != "inherit")


def node(name: str) -> DictConfig:
    loaded = OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


@pytest.mark.parametrize("name", SIZES)
def test_the_number_of_parameters_is_the_one_in_the_header(name: str) -> None:
    config = build(node(name), "model")
    with torch.device("meta"):
        model = BitNetForCausalLM(config)
    count = sum(math.prod(parameter.shape) for parameter in model.parameters())
    if name != "tiny":
        assert count == PARAMETERS[name]
        assert f": {count:,} parameters" in (CONF_DIR / "model" / f"{name}.yaml").read_text()
    for module in model.modules():
        if isinstance(module, BitLinear):
            assert module.in_features % 128 == 0  # the rows of I2_S


def test_the_default_is_2b4t() -> None:
    assert build(node("2b4t"), "model") == BitNetConfig()


@pytest.mark.parametrize("name", [*SIZES, "inherit"])
def test_every_field_stands_in_the_file(name: str) -> None:
    assert [key for key in node(name) if key != "_target_"] == [field.name for field in fields(BitNetConfig)]
