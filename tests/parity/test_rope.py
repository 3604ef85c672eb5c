"""Rotary positions against transformers: cos and sin of every type, and both spellings in config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.rope import RopeScaling, rotation

transformers = pytest.importorskip("transformers")

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA_3_1},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-short": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32},
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
}
POSITIONS = torch.tensor([[0, 1, 2, 17, 500, 4095, 8191, 32767]])


def config(scaling: dict[str, Any] | None, **fields: Any) -> BitNetConfig:
    return BitNetConfig(
        max_position_embeddings=32768, rope_scaling=None if scaling is None else RopeScaling(**scaling), **fields
    )


@pytest.mark.parametrize("heads", [20, 64], ids=["head_dim 128", "head_dim 40"])
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_are_those_of_transformers(name: str, heads: int) -> None:
    from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding

    ours = config(SCALINGS[name], num_attention_heads=heads, num_key_value_heads=4)
    reference = BitNetRotaryEmbedding(transformers.BitNetConfig(**ours.to_json()))
    by = rotation(POSITIONS, ours.head_dim, ours.rope_theta, ours.rope_scaling)
    # A last bit of a frequency, 6e-8 of it, is an angle of 2e-3 at position 32768.
    expected = reference(torch.zeros(1), POSITIONS)
    assert reference.attention_scaling == pytest.approx(
        1.0 if ours.rope_scaling is None else ours.rope_scaling.magnitude
    )
    for got, want in zip(by, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[:, 0, :5], want[:, :5], rtol=0, atol=1e-4)
        torch.testing.assert_close(got[:, 0], want, rtol=0, atol=4e-3)


@pytest.mark.parametrize("name", SCALINGS)
def test_config_json_makes_the_round_trip_by_way_of_transformers(tmp_path: Path, name: str) -> None:
    ours = config(SCALINGS[name], rope_theta=12345.0)
    assert BitNetConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    assert ("rope_scaling" in ours.to_json()) == (name != "default")
    transformers.BitNetConfig(**ours.to_json()).save_pretrained(tmp_path)  # writes rope_parameters
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 12345.0
    assert BitNetConfig.from_json(written) == ours


def read(**fields: object) -> BitNetConfig:
    return BitNetConfig.from_json({"model_type": "bitnet", "max_position_embeddings": 4096, **fields})


def test_older_spellings() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling("linear", 2.0)
    assert read(rope_scaling={"type": "default"}).rope_scaling is None
    assert read(rope_scaling=None, rope_theta=7e3) == read(rope_parameters={"rope_type": "default", "rope_theta": 7e3})
    yarn = read(rope_scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": None}).rope_scaling
    assert yarn == RopeScaling("yarn", 4.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type must be one of linear, llama3, yarn"),
        ({"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0]}, "rope_scaling.long_factor is no field"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast is no field of rope_type linear"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor must be set for rope_type llama3"),
        ({"rope_type": "llama3", **LLAMA_3_1, "low_freq_factor": 5.0}, "low_freq_factor must lie between 0 and"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40.0}, "beta_fast must be above beta_slow (40.0), got 32"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor must be above 0, got 0.0"),
        ({"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is no field"),
    ],
)
def test_scalings_that_are_refused(scaling: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        read(rope_scaling=scaling)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
