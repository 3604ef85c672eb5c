"""The fields that are read of files of a model that others wrote, and their types: see `json_file`.

    ModelFolder          config.json: what says which folder it is
    Config               config.json of a model that is ours: sizes, positions, ids
    Index                model.safetensors.index.json
    GenerationConfig     generation_config.json
    TokenizerConfig      tokenizer_config.json, special_tokens_map.json
    TokenizerJson        tokenizer.json, beside what the tokenizers library checks
    GGUF_MODEL           the keys of a GGUF file that say what config.json says
    GGUF_TOKENIZER       those of its tokenizer

A number that transformers takes as a float may be an integer; a size may not be a float. None is "not set".
"""

from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from bitnet_train.formats.gguf_bitnet import ARCHITECTURES, FLOAT_KEYS, INTEGER_KEYS, ROPE_TYPE

_MOST = 3.4028234663852886e38  # of float32, in which all of it is computed
_Float = Annotated[float, Meta(ge=-_MOST, le=_MOST)]
_Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Whole = Annotated[float, Meta(ge=-(2.0**53), le=2.0**53)]  # an integer, written as 4096.0 too
_Ids = _Int | list[_Int] | None


class Rope(TypedDict, total=False):
    """rope_scaling, or transformers 5's rope_parameters; fields as in `RopeScaling`."""

    type: str | None
    rope_type: str | None
    rope_theta: _Float | None
    factor: _Float | None
    original_max_position_embeddings: _Whole | None
    low_freq_factor: _Float | None
    high_freq_factor: _Float | None
    attention_factor: _Float | None
    beta_fast: _Float | None
    beta_slow: _Float | None
    mscale: _Float | None
    mscale_all_dim: _Float | None
    truncate: bool | None
    partial_rotary_factor: _Float | None


class Quantization(TypedDict, total=False):
    """quantization_config."""

    quant_method: str | None
    linear_class: str | None
    quantization_mode: str | None
    use_rms_norm: bool | None
    modules_to_not_convert: list[str] | None


class ModelFolder(TypedDict, total=False):
    """config.json of any model: another architecture may have other types elsewhere."""

    model_type: str | None
    quantization_config: Quantization | None


class Config(ModelFolder, total=False):
    """config.json of a BitNet, or of a dense model that one starts from."""

    vocab_size: _Int | None
    hidden_size: _Int | None
    intermediate_size: _Int | None
    num_hidden_layers: _Int | None
    num_attention_heads: _Int | None
    num_key_value_heads: _Int | None
    head_dim: _Int | None
    hidden_act: str | None
    max_position_embeddings: _Int | None
    original_max_position_embeddings: _Int | None
    initializer_range: _Float | None
    rms_norm_eps: _Float | None
    attention_dropout: _Float | None
    partial_rotary_factor: _Float | None
    rope_theta: _Float | None
    rope_scaling: Rope | None
    rope_parameters: Rope | None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    is_causal: bool | None
    layer_types: list[str] | None
    use_sliding_window: bool | None
    sliding_window: _Int | None
    bos_token_id: _Ids
    eos_token_id: _Ids
    pad_token_id: _Ids


class Index(TypedDict, total=False):
    """model.safetensors.index.json."""

    weight_map: Required[dict[str, str]]


class GenerationConfig(TypedDict, total=False):
    """generation_config.json."""

    bos_token_id: _Ids
    eos_token_id: _Ids
    pad_token_id: _Ids


class Token(TypedDict, total=False):
    """A special token with its flags."""

    content: Required[str]


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json; special_tokens_map.json has the roles alone."""

    bos_token: str | Token | None
    eos_token: str | Token | None
    pad_token: str | Token | None
    unk_token: str | Token | None
    add_bos_token: bool | None
    chat_template: str | list[NamedTemplate] | None


class _Model(TypedDict, total=False):
    type: str
    unk_token: str | None
    ignore_merges: bool | None
    dropout: float | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None


class _Pattern(TypedDict, total=False):
    Regex: str


class _Step(TypedDict, total=False):
    type: str
    pattern: _Pattern
    behavior: str
    invert: bool
    add_prefix_space: bool
    use_regex: bool
    individual_digits: bool


class _PreTokenizer(_Step, total=False):
    pretokenizers: list[_Step]


class _Normalizer(TypedDict, total=False):
    normalizers: list[Any]


class TokenizerJson(TypedDict, total=False):
    """tokenizer.json: what decides whether GGUF can say it."""

    model: Required[_Model]
    normalizer: _Normalizer | None
    pre_tokenizer: _PreTokenizer | None


_ROLES = ("bos", "eos", "eot", "eom", "padding")
_MODEL_KEYS = {
    "general.architecture": str,
    **{f"{name}.{key}": _Int for name in ARCHITECTURES.values() for key in INTEGER_KEYS},
    **{f"{name}.{key}": _Float for name in ARCHITECTURES.values() for key in FLOAT_KEYS},
    **{f"{name}.{ROPE_TYPE}": str for name in ARCHITECTURES.values()},
}
_TOKENIZER_KEYS = {
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": list[str],
    "tokenizer.ggml.token_type": list[int],
    "tokenizer.ggml.merges": list[str],
    **{f"tokenizer.ggml.{role}_token_id": _Int for role in _ROLES},
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.chat_template": str,
}
GGUF_MODEL = TypedDict("GGUF_MODEL", _MODEL_KEYS, total=False)  # type: ignore[misc]
GGUF_TOKENIZER = TypedDict("GGUF_TOKENIZER", _TOKENIZER_KEYS, total=False)  # type: ignore[misc]
