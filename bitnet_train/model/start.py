"""The decoder that a run starts from: the masters of a BitNet, or a dense Llama-style model made one.

A dense decoder of that style has every matrix of a BitNet under the same name. What it lacks are the sub-norms:

    attention     o_proj(heads)             ->  o_proj(attn_sub_norm(heads))
    feed-forward  down_proj(act(g) * u)     ->  down_proj(ffn_sub_norm(act(g) * u))

They are inserted with gain 1. That changes the function, as rounding the weights does, so the model has to be trained
before it is of use again (Wu et al., BitNet Distillation, arXiv 2510.13998, stage 1).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_train.errors import UserError, within
from bitnet_train.formats.hf_folder import CONFIG, HFFolder
from bitnet_train.formats.json_file import check
from bitnet_train.formats.schemas import Config
from bitnet_train.model.accounting import check_modules, check_sizes, left_out
from bitnet_train.model.config import BitNetConfig, rope_fields
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import copy_tensor, master_folder

DENSE_TYPES = ("llama", "mistral", "qwen2")
_TYPES = ("bitnet", *DENSE_TYPES)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "max_position_embeddings")
_DEFAULTS = {  # what transformers takes where config.json is silent
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each id
_INSERTED = re.compile(r"\.(attn_sub_norm|ffn_sub_norm)\.weight$")


@dataclass(frozen=True)
class StartReport:
    """The fate of every tensor, by name: those of the folder copied or left out, those of the model initialised.

    Attributes:
        added_rows: rows of the vocabulary that the folder lacks.
    """

    source: str
    config: BitNetConfig
    copied: Sequence[str]
    initialised: Sequence[str]
    left_out: Sequence[str]
    added_rows: int = 0

    def __str__(self) -> str:
        """A few lines for people; a name that recurs in every layer stands once, with its number."""
        config = {name: value for name, value in self.config.to_json().items() if name != "quantization_config"}
        return "\n".join(
            [
                f"start from {self.source}",
                f"copied: {_summary(self.copied)}",
                f"initialised (gains 1, biases 0): {_summary(self.initialised)}",
                f"left out (tied or computed): {_summary(self.left_out)}",
                *([f"added to the vocabulary: {self.added_rows} rows, drawn anew"] if self.added_rows else []),
                f"model: {', '.join(f'{name} {value}' for name, value in config.items())}",
                f"linear layers: {'ternary' if self.config.quantize else 'dense'}",
            ]
        )


def _summary(names: Sequence[str]) -> str:
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    counts = [f"{name} x {count}" if count > 1 else name for name, count in kinds.items()]
    return f"{len(names)} tensors" + (f": {', '.join(counts)}" if names else "")


def starting_config(folder: Path) -> BitNetConfig:
    """The configuration of the BitNet that starts from this folder.

    Raises:
        UserError: it is no model that a BitNet can start from.
    """
    config, where = master_folder(folder).config, folder / CONFIG
    if config.get("model_type") not in _TYPES:
        raise UserError(
            f"{where}: model_type must be one of {', '.join(_TYPES)} to start from, got {config.get('model_type')!r}, "
            "which has layers that a BitNet lacks; start from another model"
        )
    if config["model_type"] not in DENSE_TYPES:
        return BitNetConfig.from_json(config, where)
    check(config, str(where), Config)
    with within(where):
        return _from_dense(config)


def _from_dense(config: Mapping[str, Any]) -> BitNetConfig:
    missing = [name for name in _REQUIRED if not config.get(name)]
    if missing:
        raise UserError(f"{missing[0]} must be set; write the model again with transformers")
    _check_representable(config)
    given = {name: value for name, value in config.items() if name in (*_REQUIRED, *_DEFAULTS) and value is not None}
    values = {**_DEFAULTS, **given, **rope_fields(config, config["max_position_embeddings"])}
    values["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    values["attention_bias"] |= config["model_type"] == "qwen2"  # on q, k and v, and no field says so
    return BitNetConfig(**values)


def _check_representable(config: Mapping[str, Any]) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, head_dim):
        raise UserError(
            f"head_dim must be hidden_size / num_attention_heads ({head_dim}) in a BitNet, got {config['head_dim']}; "
            "start from another model"
        )
    if config.get("mlp_bias"):
        raise UserError("mlp_bias must be false in a BitNet, got true; start from another model")


def _check_sizes(folder: Path, stored: BitNetConfig, config: BitNetConfig) -> None:
    """The vocabulary alone may grow."""
    for name in (*_SIZES, "num_key_value_heads"):
        there, here = getattr(stored, name), getattr(config, name)
        grows = name == "vocab_size"
        if here < there or (here > there and not grows):
            least = "at least " if grows else ""
            raise UserError(f"model.{name} must be {least}{there}, as in {folder}, got {here}; leave it out")


def _check_window(folder: Path, source: Mapping[str, Any], config: BitNetConfig) -> None:
    """Attention over a window is ours for as long as a context fits into the window."""
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"{folder / CONFIG}: attends over a sliding_window of {window}, which a BitNet does not; take it for "
            f"contexts that fit: model=inherit model.max_position_embeddings={window}"
        )


def start_from(folder: Path, config: BitNetConfig) -> tuple[BitNetForCausalLM, StartReport]:
    """A decoder of this configuration with the folder's weights, its parameters in float32.

    Args:
        folder: masters of a BitNet, or a dense model of `DENSE_TYPES`, in safetensors of any floating dtype.
        config: `starting_config` of the folder, or a variation of it. Rows of the vocabulary that the folder lacks
            stay as they were drawn.

    Raises:
        UserError: a size is changed, or a tensor is missing, has another shape, or has no place in the decoder.
    """
    stored, source = starting_config(folder), master_folder(folder)
    _check_sizes(folder, stored, config)
    model_type = source.config.get("model_type")
    if model_type in DENSE_TYPES:
        _check_window(folder, source.config, config)
    check_sizes(folder, stored, source.shapes)
    model = BitNetForCausalLM(config)
    parameters = dict(model.named_parameters())
    initialised = [name for name in parameters if name not in source.tensors and _may_be_new(name, model_type)]
    check_modules(folder / CONFIG, source.config.get("quantization_config"), config)
    unused = sorted(left_out(source, parameters, config))
    copied = [name for name in parameters if name not in initialised]
    added = config.vocab_size - stored.vocab_size
    for name in copied:
        if added and name in _BY_TOKEN:
            _copy_rows(source, name, parameters[name], stored.vocab_size)
        else:
            copy_tensor(source, name, parameters[name])
    return model, StartReport(f"{folder} ({model_type})", config, copied, initialised, unused, added)


@torch.no_grad()
def _copy_rows(source: HFFolder, name: str, parameter: Tensor, rows: int) -> None:
    """Copies the first rows, which are all that the folder has; those behind them stay."""
    whole = parameter.clone()
    copy_tensor(source, name, whole[:rows])
    parameter.copy_(whole)  # in one piece, of which a rank takes its rows


def _may_be_new(name: str, model_type: object) -> bool:
    """Whether the dense model is known to lack the tensor; biases of `BitNetForCausalLM` start at 0, gains at 1."""
    inserted = model_type in DENSE_TYPES and _INSERTED.search(name) is not None
    return inserted or (model_type == "qwen2" and name.endswith("o_proj.bias"))
