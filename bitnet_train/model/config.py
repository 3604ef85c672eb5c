"""The decoder's configuration: the fields of transformers' BitNetConfig, checked once, when it is made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitnet_train.errors import UserError, within
from bitnet_train.formats.json_file import check
from bitnet_train.formats.schemas import Config
from bitnet_train.model.rope import RopeScaling

HIDDEN_ACTS = ("relu2", "silu")


@dataclass(frozen=True)
class BitNetConfig:
    """Shape of a BitNet decoder; defaults that the released config.json and transformers share are the released ones.

    Attributes:
        vocab_size: rows of the embedding, at least the tokenizer's.
        hidden_size: features of the residual stream.
        intermediate_size: features inside the feed-forward block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads, of hidden_size / num_attention_heads features each.
        num_key_value_heads: heads of keys and values, which groups of query heads share.
        hidden_act: relu2 or silu, on the gate of the feed-forward block.
        max_position_embeddings: the longest context, positions.
        initializer_range: standard deviation of fresh weights.
        rms_norm_eps: what a norm adds to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretches the frequencies for longer contexts, see `RopeScaling`.
        tie_word_embeddings: the embedding is the head, too.
        attention_bias: biases on q, k, v and o.
        attention_dropout: probability of leaving out an attention weight while training.
        quantize: false makes every BitLinear a plain Linear: the dense twin. The one field that config.json holds
            elsewhere: as its `quantization_config`.

    Raises:
        UserError: a field is out of range; the message names it and the value.
    """

    vocab_size: int = 128256
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int = 5
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    quantize: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size must be a multiple of model.num_attention_heads ({self.num_attention_heads}), "
                f"got {self.hidden_size}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.hidden_size / model.num_attention_heads must be even (rotary pairs), got {self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads must be a multiple of model.num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            raise UserError(f"model.hidden_act must be one of {', '.join(HIDDEN_ACTS)}, got {self.hidden_act!r}")
        if not (self.initializer_range > 0.0 and self.rope_theta > 1.0 and self.rms_norm_eps >= 0.0):
            raise UserError(
                "model.initializer_range must be above 0, model.rope_theta above 1, model.rms_norm_eps at least 0, got "
                f"{self.initializer_range}, {self.rope_theta}, {self.rms_norm_eps}"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise UserError(f"model.attention_dropout must lie in [0, 1), got {self.attention_dropout}")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_json(self) -> dict[str, Any]:
        """config.json of a folder of master weights, as transformers reads it (bitnet-b1.58-2B-4T-bf16's keys).

        Scaled positions are `rope_theta` and `rope_scaling` beside it, which every transformers with this model reads;
        before 5 it overlooks `rope_parameters`, and computes another function.
        """
        shape = {name: value for name, value in asdict(self).items() if name not in ("quantize", "rope_scaling")}
        config = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", **shape}
        if self.rope_scaling is not None:
            config["rope_scaling"] = {name: v for name, v in asdict(self.rope_scaling).items() if v is not None}
        if self.quantize:
            # Without this key transformers loads the masters as a dense model, which is another function.
            config["quantization_config"] = {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "online",
            }
        return config

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: object = "config.json") -> "BitNetConfig":
        """Reads a config.json: ours, the released ones and transformers 5's own (rope_parameters).

        Args:
            config: its content.
            where: the file, for messages.

        Raises:
            UserError: the model is no BitNet, it has a feature that this decoder lacks, or a field is of another type.
        """
        with within(where):
            if config.get("model_type") != "bitnet":
                raise UserError(f"model_type must be 'bitnet', got {config.get('model_type')!r}")
        check(config, str(where), Config)
        with within(where):
            _check_function(config)
            return cls(**_values(config), quantize=config.get("quantization_config") is not None)


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `BitNetConfig` that a config.json sets."""
    known = {field.name for field in fields(BitNetConfig)} - {"quantize", "rope_scaling"}
    values = {name: value for name, value in config.items() if name in known and value is not None}
    # What transformers takes where config.json is silent
    values.setdefault("num_key_value_heads", values.get("num_attention_heads", BitNetConfig.num_attention_heads))
    values.setdefault("tie_word_embeddings", False)
    values.setdefault("max_position_embeddings", 2048)
    trained = config.get("original_max_position_embeddings") or values["max_position_embeddings"]
    return values | rope_fields(config, trained)


def _check_function(config: Mapping[str, Any]) -> None:
    """Refuses fields by which transformers computes another function."""
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    width = size // heads if size and heads else None
    wanted = {
        "head_dim": (None, width),
        "is_causal": (None, True),
        "partial_rotary_factor": (None, 1.0),
    }
    for name, values in wanted.items():
        if config.get(name) not in values:
            raise UserError(f"{name} must be {values[-1]} in a BitNet, got {config[name]!r}")
    if {*(config.get("layer_types") or ())} - {"full_attention"}:
        raise UserError(f"layer_types must be full_attention in a BitNet, got {config['layer_types']}")


def rope_fields(config: Mapping[str, Any], trained: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, where they are set, from any config.json.

    It holds `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`, whose type was once called `type`.

    Args:
        config: the content of config.json.
        trained: the original context length, where it is not given.

    Raises:
        UserError: the scaling is of a type, or has a field, that this decoder lacks.
    """
    rope = {**(config.get("rope_scaling") or config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    found = {} if theta is None else {"rope_theta": theta}
    older = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", older)
    return found if rope_type == "default" else {**found, "rope_scaling": _scaling(rope_type, rope, trained)}


def _scaling(rope_type: str, rope: Mapping[str, Any], trained: int) -> RopeScaling:
    known = {field.name for field in fields(RopeScaling)}
    values = {name: value for name, value in rope.items() if (name, value) != ("partial_rotary_factor", 1.0)}
    if unknown := values.keys() - known:
        raise UserError(
            f"rope_scaling.{min(unknown)} is no field that this decoder knows, "
            f"got rope_type {rope_type!r} with {dict(rope)}"
        )
    if values.get("factor") is None:
        raise UserError(f"rope_scaling.factor must be set for rope_type {rope_type!r}, got none")
    if rope_type != "linear" and values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = trained
    if (length := values.get("original_max_position_embeddings")) is not None:
        values["original_max_position_embeddings"] = _whole(length)
    return RopeScaling(rope_type, **values)


def _whole(length: float) -> int:
    """A length that was written as 4096.0, too."""
    if length != int(length):
        raise UserError(f"rope_scaling.original_max_position_embeddings must be a whole number, got {length}")
    return int(length)
