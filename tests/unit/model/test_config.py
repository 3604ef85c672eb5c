"""A config.json of others: fields are checked before they are used, and messages name the file."""

from typing import Any

import pytest

from bitnet_train.errors import UserError
from bitnet_train.model.config import BitNetConfig

YARN = {"rope_type": "yarn", "factor": 4.0}


def test_a_length_may_be_written_as_a_float() -> None:
    rope = {**YARN, "original_max_position_embeddings": 4096.0}
    scaling = BitNetConfig.from_json({"model_type": "bitnet", "rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert repr(scaling.original_max_position_embeddings) == "4096"


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 10000, "rms_norm_eps": 0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": None, "rope_scaling": None, "num_key_value_heads": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": None}},
    ],
)
def test_what_transformers_takes_is_taken(fields: dict[str, Any]) -> None:
    assert BitNetConfig.from_json({"model_type": "bitnet", **fields})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hidden_size": "128"}, "hidden_size: must be an integer or null, got a string; mend the file"),
        ({"hidden_size": 128.0}, "hidden_size: must be an integer or null, got a number"),
        ({"hidden_size": 10**400}, "hidden_size: must be an integer <= 9223372036854775807"),
        ({"hidden_size": -128}, "model.hidden_size must be at least 1, got -128"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be an integer or null, got true or false"),
        ({"vocab_size": [320]}, "vocab_size: must be an integer or null, got a list"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: must be a number or null, got a string"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: must be a number <="),
        ({"rope_theta": "big"}, "rope_theta: must be a number or null, got a string"),
        ({"rope_theta": 1e308}, "rope_theta: must be a number <="),
        ({"rope_theta": 10**400}, "rope_theta: Number out of range"),
        ({"rope_parameters": {"rope_theta": 1e308}}, "rope_parameters.rope_theta: must be a number <="),
        ({"rope_scaling": "linear"}, "rope_scaling: must be an object or null, got a string"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type: must be a string or null, got a list"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor: must be a number or null"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor must be set for rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling.factor must be set"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 4096.5}}, "rope_scaling.original_max_position"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1e30}}, "rope_scaling.original_max_position"),
        ({"rope_scaling": {**YARN, "beta_fast": True}}, "rope_scaling.beta_fast: must be a number or null"),
        ({"rope_scaling": {**YARN, "mscale": 1e30, "mscale_all_dim": -1e30}}, "rope_scaling.mscale_all_dim must"),
        ({"rope_scaling": {**YARN, "beta_slow": 1e-320}}, "rope_scaling.beta_slow must"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: must be true or false or null, got a string"),
        ({"layer_types": 5}, "layer_types: must be a list or null, got an integer"),
        ({"hidden_act": ["relu2"]}, "hidden_act: must be a string or null, got a list"),
        ({"eos_token_id": [[1]]}, "eos_token_id[0]: must be an integer, got a list"),
        ({"model_type": "x"}, "model_type must be 'bitnet', got 'x'"),
    ],
)
def test_what_is_no_configuration_is_named_with_its_file(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as error:
        BitNetConfig.from_json({"model_type": "bitnet", **fields}, "some/config.json")
    assert f"some/config.json: {problem}" in str(error.value)
