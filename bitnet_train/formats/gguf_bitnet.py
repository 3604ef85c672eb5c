"""The two GGUF architectures of BitNet: the names of their tensors and keys, both ways.

    hidden_act   architecture    read by
    relu2        bitnet-b1.58    bitnet.cpp, ik_llama.cpp
    silu         bitnet          llama.cpp, ik_llama.cpp, bitnet.cpp

    model.layers.N.self_attn.q_proj.weight  ->  blk.N.attn_q.weight        and so on, see the tables
    model.embed_tokens.weight               ->  token_embd.weight
    lm_head.weight                          ->  output.weight              absent where the embedding serves as head

The graph behind a name is fixed: gated feed-forward with that activation and a sub-norm, NEOX rotary order (so q and k
are not permuted), no biases, no frequency factors. llama.cpp takes relu^2 weights under the name `bitnet` and computes
SiLU without a word. bitnet.cpp, and llama.cpp for `bitnet`, multiply with token_embd for the logits even where
output.weight exists; ik_llama.cpp reads output.weight.

Source: `build_bitnet_158` in Eddie-Wang1120/llama.cpp at 1f86f058 (the submodule of microsoft/BitNet at 01eb4157);
src/models/bitnet.cpp in llama.cpp; src/graphs/build_bitnet.cpp in ik_llama.cpp, and its PR 338 on the head.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

ARCHITECTURES = {"relu2": "bitnet-b1.58", "silu": "bitnet"}

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
_ROPE_SCALING = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
_ROPE_KEYS = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}
_FLOATS = ("rope_theta", "rms_norm_eps", "factor")  # float32 in a file, also where config.json has 500000
_MOST = 2**32 - 1  # the integers are uint32: the runtimes refuse a wider type
ROPE_TYPE = "rope.scaling.type"
_FIELDS = {
    **_KEYS,
    "rope.dimension_count": "head_dim",
    **{f"rope.scaling.{key}": name for name, key in _ROPE_KEYS.items()},
}
FLOAT_KEYS = tuple(key for key, field in _FIELDS.items() if field in _FLOATS)
INTEGER_KEYS = tuple(key for key, field in _FIELDS.items() if field not in _FLOATS)
_ROPE_DEFAULTS = {  # what the graphs compute with, beside an attention factor by yarn
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_LAYER_NAMES, _OTHER_NAMES = ({to: name for name, to in names.items()} for names in (_LAYER_TENSORS, _OTHER_TENSORS))


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor, given the name that transformers has for it."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.weight" if layer else f"{_OTHER_TENSORS[stem]}.weight"


def transformers_name(stored: str) -> str:
    """The inverse of `gguf_name`; a name that is none of its results stays as it is."""
    stem, _, ending = stored.rpartition(".")
    if ending != "weight":
        return stored
    if (layer := re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(.+)", stem)) and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    return f"{_OTHER_NAMES[stem]}.weight" if stem in _OTHER_NAMES else stored


def model_metadata(
    name: str, config: Mapping[str, Any], file_type: int, licence: str | None = None
) -> dict[str, object]:
    """The general.* keys and those of the architecture.

    Args:
        name: the model's name, for people.
        config: the fields of the model's configuration, named as in config.json.
        file_type: general.file_type: llama.cpp's number for "most matrices have this type".
        licence: its SPDX identifier, in lower case.

    Raises:
        ValueError: the rotary embedding is scaled in a way that the graphs do not compute, or a number is beyond the
            type of its key.
    """
    architecture = ARCHITECTURES[config["hidden_act"]]
    keys = {
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        **{key: _typed(field, config[field]) for key, field in _KEYS.items()},
        **_rope_keys(config.get("rope_scaling") or config.get("rope_parameters") or {}),
    }
    return {
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **({"general.license": licence} if licence else {}),
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }


def _typed(field: str, value: Any) -> float | int:
    if field in _FLOATS:
        return float(value)
    if int(value) > _MOST:
        raise ValueError(f"{field} must be at most {_MOST} for GGUF, got {value}; use --format safetensors")
    return int(value)


def _rope_keys(rope: Mapping[str, Any]) -> dict[str, object]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    others = {key: rope[key] for key, value in _ROPE_DEFAULTS.items() if rope.get(key) not in (None, value)}
    if kind not in _ROPE_SCALING or others:
        raise ValueError(
            f"rope scaling must be linear, or yarn with the paper's constants, for GGUF's graphs, got {dict(rope)}"
        )
    fields = {key: _typed(field, rope[field]) for field, key in _ROPE_KEYS.items() if field in _ROPE_SCALING[kind]}
    return {ROPE_TYPE: kind, **{f"rope.scaling.{key}": value for key, value in fields.items()}}


def config_json(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of the model in a GGUF file: the inverse of `model_metadata`.

    Args:
        metadata: the file's keys.
        tied: whether the embedding serves as head, which no key says.

    Raises:
        ValueError: the architecture is no BitNet, or a key is missing.
    """
    architecture = metadata.get("general.architecture")
    activations = {name: hidden_act for hidden_act, name in ARCHITECTURES.items()}
    if architecture not in activations:
        raise ValueError(f"general.architecture must be one of {', '.join(activations)}, got {architecture!r}")
    missing = [key for key in _KEYS if f"{architecture}.{key}" not in metadata]
    if missing:
        raise ValueError(f"key {architecture}.{missing[0]} must be there, got {len(metadata)} others")
    known = {
        *_KEYS,
        "rope.dimension_count",
        ROPE_TYPE,
        *(f"rope.scaling.{key}" for key in _ROPE_KEYS.values()),
    }
    prefix = f"{architecture}."
    for key in metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in known:
            raise ValueError(f"key {key} must not be there, as this decoder does not compute it, got {metadata[key]!r}")
    heads = metadata[f"{architecture}.embedding_length"] // max(1, metadata[f"{architecture}.attention.head_count"])
    if (turned := metadata.get(f"{architecture}.rope.dimension_count", heads)) != heads:
        raise ValueError(f"key {architecture}.rope.dimension_count must be {heads}, the width of a head, got {turned}")
    if f"{architecture}.{ROPE_TYPE}" not in metadata:
        for key in _ROPE_KEYS.values():
            if f"{architecture}.rope.scaling.{key}" in metadata:
                raise ValueError(f"key {architecture}.rope.scaling.type must be there beside {key}, got none")
    values = {field: _shortest(metadata[f"{architecture}.{key}"]) for key, field in _KEYS.items()}
    scaling = {"rope_type": metadata.get(f"{architecture}.{ROPE_TYPE}", "none")}
    for field, key in _ROPE_KEYS.items():
        if (value := metadata.get(f"{architecture}.rope.scaling.{key}")) is not None:
            scaling[field] = _shortest(value)
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": activations[architecture],
        **values,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        **({"rope_scaling": scaling} if scaling["rope_type"] != "none" else {}),
    }


def _shortest(value: float | int) -> float | int:
    """A float32 as the shortest decimal that reads back to it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
