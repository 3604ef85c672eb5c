"""The names and keys of BitNet's architectures, counted for the released 2B model, and read back."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_train.formats.gguf_bitnet import ARCHITECTURES, config_json, gguf_name, model_metadata, transformers_name
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM


def test_the_2b_model_has_the_332_tensors_of_the_released_file() -> None:
    with torch.device("meta"):
        shapes = BitNetForCausalLM(BitNetConfig()).state_dict()
    names = [gguf_name(name) for name in shapes]
    assert len(set(names)) == len(names) == 332
    assert Counter(len(tensor.shape) for tensor in shapes.values()) == {1: 121, 2: 211}
    assert "output.weight" not in names


def test_names() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.12.input_layernorm.weight") == "blk.12.attn_norm.weight"
    assert gguf_name("model.layers.12.post_attention_layernorm.weight") == "blk.12.ffn_norm.weight"
    assert gguf_name("model.layers.3.self_attn.o_proj.weight") == "blk.3.attn_output.weight"
    assert gguf_name("model.layers.3.self_attn.attn_sub_norm.weight") == "blk.3.attn_sub_norm.weight"
    assert gguf_name("model.layers.3.mlp.ffn_sub_norm.weight") == "blk.3.ffn_sub_norm.weight"
    assert gguf_name("model.layers.3.mlp.down_proj.weight") == "blk.3.ffn_down.weight"


@pytest.mark.parametrize("name", ["model.layers.12.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_names_come_back(name: str) -> None:
    assert transformers_name(gguf_name(name)) == name


@pytest.mark.parametrize(
    "stored", ["blk.0.attn_k", "blk.01.attn_k.weight", "rope_freqs.weight", "blk.0.output.weight", ""]
)
def test_a_name_that_none_becomes_stays(stored: str) -> None:
    assert transformers_name(stored) == stored


@pytest.mark.parametrize("field", ["max_position_embeddings", "vocab_size"])
def test_a_number_beyond_its_key_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at most 4294967295 for GGUF, got 10000000000"):
        model_metadata("m", {**asdict(BitNetConfig()), field: 10**15}, 0)


def test_keys_of_the_2b_model() -> None:
    assert model_metadata("2b", asdict(BitNetConfig()), 40) == {
        "general.name": "2b",
        "general.file_type": 40,
        "general.quantization_version": 2,
        "bitnet-b1.58.vocab_size": 128256,
        "bitnet-b1.58.context_length": 4096,
        "bitnet-b1.58.embedding_length": 2560,
        "bitnet-b1.58.block_count": 30,
        "bitnet-b1.58.feed_forward_length": 6912,
        "bitnet-b1.58.rope.dimension_count": 128,
        "bitnet-b1.58.rope.freq_base": 500000.0,
        "bitnet-b1.58.attention.head_count": 20,
        "bitnet-b1.58.attention.head_count_kv": 5,
        "bitnet-b1.58.attention.layer_norm_rms_epsilon": 1e-5,
    }


def stored(config: dict[str, Any]) -> dict[str, Any]:
    """The keys as a file gives them back: floats have been float32."""
    metadata = {"general.architecture": ARCHITECTURES[config["hidden_act"]], **model_metadata("m", config, 40)}
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in metadata.items()}


@pytest.mark.parametrize("hidden_act", ["relu2", "silu"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_configuration_comes_back(hidden_act: str, tied: bool) -> None:
    config = replace(BitNetConfig(), hidden_act=hidden_act, tie_word_embeddings=tied, rope_theta=10000.0)
    found = config_json(stored(asdict(config)), tied)
    assert BitNetConfig.from_json({**found, "quantization_config": {}}) == config


def test_whole_numbers_of_config_json_are_stored_as_the_floats_that_readers_want() -> None:
    found = model_metadata("2b", asdict(BitNetConfig()) | {"rope_theta": 500000}, 40)
    assert isinstance(found["bitnet-b1.58.rope.freq_base"], float)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 4}, {"type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 4096},
        ),
    ],
)
def test_rope_scaling_is_stored_and_read_back(rope: dict[str, Any], keys: dict[str, object]) -> None:
    config = asdict(BitNetConfig()) | {"rope_scaling": rope}
    found = stored(config)
    prefix = "bitnet-b1.58.rope.scaling."
    assert {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)} == keys
    back = config_json(found, True).get("rope_scaling", {})
    assert back.get("rope_type", "default") == keys.get("type", "default")
    assert back.get("factor") == keys.get("factor")
    assert back.get("original_max_position_embeddings") == keys.get("original_context_length")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 0.7},
    ],
)
def test_rope_scaling_that_the_graphs_do_not_compute_is_refused(rope: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"rope scaling must be linear, or yarn with the paper's constants, .* got"):
        model_metadata("m", asdict(BitNetConfig()) | {"rope_scaling": rope}, 40)


def test_other_architectures_and_missing_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture must be one of bitnet-b1\.58, bitnet, got 'llama'"):
        config_json({"general.architecture": "llama"}, True)
    found = stored(asdict(BitNetConfig()))
    del found["bitnet-b1.58.block_count"]
    with pytest.raises(ValueError, match=r"key bitnet-b1\.58\.block_count must be there"):
        config_json(found, True)


def test_the_licence_is_written_where_it_is_known() -> None:
    assert model_metadata("m", asdict(BitNetConfig()), 40, "mit")["general.license"] == "mit"
