"""Where a model can go: every target, what reads it, and why not, where a model cannot go there.

    target                      tensors of a BitLinear                           read by
    safetensors autobitlinear   codes, 2 bits, and g                             transformers
    safetensors bitlinear       codes, 2 bits, and 1 / g                         transformers (as Falcon-E)
    master                      float masters                                    transformers, and training
    gguf i2_s                   codes, 2 bits, and g                             bitnet.cpp; ik_llama.cpp by its IQ2_BN
    gguf tq1_0, tq2_0           codes, 1.69 and 2.06 bits, and g in float16      llama.cpp
    gguf f16, bf16, f32         q g                                              ik_llama.cpp; llama.cpp for silu

What a format cannot hold, or its readers would compute wrongly without a word, is refused before anything is written.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from bitnet_train.errors import UserError
from bitnet_train.export.source import Source
from bitnet_train.formats.gguf_bitnet import model_metadata
from bitnet_train.formats.gguf_blocks import GGMLType, tensor_bytes
from bitnet_train.formats.hf_folder import CONFIG, LINEAR_CLASSES
from bitnet_train.formats.packing import packed_shape
from bitnet_train.model.weights import located

FORMATS = ("safetensors", "gguf", "master")


class GGUFTypes(NamedTuple):
    """What `--type` stands for: the types of the ternary matrices and of embedding and head, and general.file_type."""

    ternary: GGMLType
    embedding: GGMLType
    file_type: int


GGUF_TYPES = {
    "i2_s": GGUFTypes(GGMLType.I2_S, GGMLType.F16, 40),
    "tq1_0": GGUFTypes(GGMLType.TQ1_0, GGMLType.F16, 36),
    "tq2_0": GGUFTypes(GGMLType.TQ2_0, GGMLType.F16, 37),
    "f16": GGUFTypes(GGMLType.F16, GGMLType.F16, 1),
    "bf16": GGUFTypes(GGMLType.BF16, GGMLType.BF16, 32),
    "f32": GGUFTypes(GGMLType.F32, GGMLType.F32, 0),
}


@dataclass(frozen=True)
class Target:
    """A format, and the linear class of packed safetensors or the type of GGUF."""

    format: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.format} {self.variant}".strip()

    def readers(self, hidden_act: str) -> str:
        """The programs that run a model of a kind that `check` lets through."""
        if self.format != "gguf":
            return "transformers"
        if self.variant == "i2_s":
            return "bitnet.cpp, ik_llama.cpp (by its own llama-quantize to IQ2_BN)"
        return "ik_llama.cpp" if hidden_act == "relu2" else "llama.cpp, ik_llama.cpp"


TARGETS = (
    *(Target("safetensors", linear_class) for linear_class in LINEAR_CLASSES),
    Target("master"),
    *(Target("gguf", type) for type in GGUF_TYPES),
)


def check(source: Source, target: Target) -> None:
    """Refuses a target that cannot hold the model, or whose readers would compute another function.

    Raises:
        UserError: with the reason and the remedy.
    """
    rules = {"safetensors": _safetensors, "master": _master, "gguf": _gguf}
    for reason in rules[target.format](source, target):
        raise UserError(reason)


def refusal(source: Source, target: Target) -> str | None:
    """Why a model cannot go to a target; None where it can."""
    try:
        check(source, target)
    except UserError as error:
        return str(error)
    return None


def _safetensors(source: Source, target: Target) -> Iterator[str]:
    for name in source.ternary_names:
        with located(source.path, name):
            packed_shape(source.shapes[name])
    if source.config.attention_bias and target.variant == "autobitlinear":
        yield (
            f"{source.path / CONFIG}: attention_bias must be false for linear_class autobitlinear, where transformers "
            "multiplies the bias by the weight's scale, got true; use --linear-class bitlinear"
        )


def _master(source: Source, target: Target) -> Iterator[str]:
    if source.kind == "ternary":
        yield (
            f"{source.path}: holds ternary codes, which cannot be turned into masters; give the run directory or "
            "folder of master weights that it was exported from"
        )


def _gguf(source: Source, target: Target) -> Iterator[str]:
    config, path = source.config, source.path / CONFIG
    if config.attention_bias:
        yield f"{path}: attention_bias must be false for GGUF, whose graphs of BitNet add no biases, got true"
    if target.variant.startswith("tq") and config.hidden_act != "silu":
        yield (
            f"{path}: hidden_act must be silu for {target.variant}, which llama.cpp runs: it takes any other model and "
            f"computes SiLU without a word, got {config.hidden_act}; use --type i2_s, for bitnet.cpp and ik_llama.cpp"
        )
    if config.hidden_act == "silu" and not config.tie_word_embeddings:
        yield (
            f"{path}: tie_word_embeddings must be true for GGUF with hidden_act silu, whose graph computes the logits "
            "with the embedding, got false; use --format safetensors"
        )
    if target.variant == "i2_s" and config.hidden_act == "relu2" and not config.tie_word_embeddings:
        yield (
            f"{path}: tie_word_embeddings must be true for i2_s, whose reader bitnet.cpp computes the logits with the "
            "embedding without a word, got false; use --type f16, which ik_llama.cpp runs, also as IQ2_BN by its "
            "llama-quantize"
        )
    types = GGUF_TYPES[target.variant]
    for name in source.ternary_names:
        with located(source.path, name):
            tensor_bytes(types.ternary, source.shapes[name])
    with located(source.path, CONFIG):
        model_metadata("", {**source.config_json, **asdict(config)}, types.file_type)
    source.tokenizer.gguf_metadata()
