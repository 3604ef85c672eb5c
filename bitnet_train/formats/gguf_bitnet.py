"""The GGUF architecture `bitnet-b1.58`: the names of its tensors and keys.

    model.layers.N.self_attn.q_proj.weight  ->  blk.N.attn_q.weight        and so on, see the tables
    model.embed_tokens.weight               ->  token_embd.weight
    lm_head.weight                          ->  output.weight              absent where the embedding serves as head

The graph behind the name is fixed: relu^2 gated feed-forward with its sub-norm, NEOX rotary order (so q and k are not
permuted), no biases. bitnet.cpp multiplies with token_embd for the logits even where output.weight exists; ik_llama.cpp
reads output.weight.

Source: `build_bitnet_158` in Eddie-Wang1120/llama.cpp at 1f86f058 (the submodule of microsoft/BitNet at 01eb4157),
src/llama.cpp, and in ikawrakow/ik_llama.cpp, src/graphs/build_bitnet.cpp; PR ik_llama.cpp#338 on the head.
"""

import re
from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "bitnet-b1.58"

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}
_OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor, given the name that transformers has for it."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.weight" if layer else f"{_OTHER_TENSORS[stem]}.weight"


def model_metadata(name: str, config: Mapping[str, Any], file_type: int) -> dict[str, object]:
    """The general.* and bitnet-b1.58.* keys.

    Args:
        name: the model's name, for people.
        config: the fields of the model's configuration, named as in config.json.
        file_type: general.file_type: llama.cpp's number for "most matrices have this type".
    """
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return {
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{ARCHITECTURE}.rope.dimension_count": head_size,
        **{f"{ARCHITECTURE}.{key}": config[field] for key, field in _KEYS.items()},
    }
