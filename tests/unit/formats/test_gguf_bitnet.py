"""The names and keys of the architecture bitnet-b1.58, counted for the released 2B model."""

from collections import Counter
from dataclasses import asdict

import torch

from bitnet_train.formats.gguf_bitnet import gguf_name, model_metadata
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
