"""Where a model can go: every target, what reads it, and why not, where a model cannot go there.

    target                      tensors of a BitLinear                           read by
    safetensors autobitlinear   codes, 2 bits, and g                             transformers
    safetensors bitlinear       codes, 2 bits, and 1 / g                         transformers (as Falcon-E)
    master                      float masters                                    transformers, and training
    gguf i2_s                   codes, 2 bits, and g                             bitnet.cpp; ik_llama.cpp by its IQ2_BN
    gguf tq1_0, tq2_0           codes, 1.69 and 2.06 bits, and g in float16      llama.cpp
    gguf f16, bf16, f32         q g                                              ik_llama.cpp; llama.cpp for silu

What a format cannot hold, or none of its readers would run as it was trained, is refused before anything is written.
"""

from collections.abc import Callable, Iterator, Mapping
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


TARGETS = (
    *(Target("safetensors", linear_class) for linear_class in LINEAR_CLASSES),
    Target("master"),
    *(Target("gguf", type) for type in GGUF_TYPES),
)


class Reader(NamedTuple):
    """A program that runs models.

    Attributes:
        name: what it is called.
        formats: the formats, and types of GGUF, that it reads.
        problems: reasons why it would not run a model of a source as it was trained, the gravest first.
        how: what else has to be done, by type.
    """

    name: str
    formats: tuple[str, ...]
    problems: Callable[[Source, Target], Iterator[str]]
    how: Mapping[str, str] = {}

    def reads(self, target: Target) -> bool:
        """Whether it reads this format at all."""
        return (target.variant if target.format == "gguf" else target.format) in self.formats

    def told(self, target: Target) -> str:
        """Its name, and what has to be done."""
        return self.name + self.how.get(target.variant, "")


def readers(source: Source, target: Target) -> list[str]:
    """The programs that run the model in this format as it was trained."""
    able = [reader for reader in READERS if reader.reads(target) and not next(reader.problems(source, target), "")]
    return [reader.told(target) for reader in able]


def check(source: Source, target: Target) -> None:
    """Refuses a target that cannot hold the model, or that no reader would run as it was trained.

    Raises:
        UserError: with the reason and the remedy.
    """
    rules = {"safetensors": _safetensors, "master": _master, "gguf": _gguf}
    for reason in rules[target.format](source, target):
        raise UserError(reason)
    if not readers(source, target):
        raise UserError(next(next(r.problems(source, target)) for r in reversed(READERS) if r.reads(target)))


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
    if "phi-3" in source.name.lower() or "phi3" in source.name.lower():
        yield (
            "the name must not hold phi-3 or phi3 for GGUF, by which runtimes take spaces behind special tokens away, "
            f"got {source.name!r}; give another --name"
        )
    types = GGUF_TYPES[target.variant]
    for name in source.ternary_names:
        with located(source.path, name):
            tensor_bytes(types.ternary, source.shapes[name])
    with located(source.path, CONFIG):
        model_metadata(source.name, {**source.config_json, **asdict(config)}, types.file_type)
    _ = source.gguf_tokenizer


def _none(source: Source, target: Target) -> Iterator[str]:
    """It runs every model that the format can hold."""
    yield from ()


def _ik_llama(source: Source, target: Target) -> Iterator[str]:
    """Products of F16 rows are computed by 4 values, of BF16 rows by 8, without a rest; keys are F16 rows of a head."""
    where = "for ik_llama.cpp, which computes {} by {} and leaves a rest out, got {}; use {}"
    if (size := source.config.head_dim) % 4:
        told = where.format("the keys of a head", 4, size, "--format safetensors")
        yield f"{source.path / CONFIG}: hidden_size / num_attention_heads must be a multiple of 4 {told}"
    width = {"f16": 4, "bf16": 8}.get(target.variant, 1)
    for name, shape in source.shapes.items():
        if len(shape) > 1 and shape[-1] % width:
            told = where.format(f"{target.variant.upper()} rows", width, shape[-1], "--type f32")
            yield f"{source.path}: {name}: the row length must be a multiple of {width} {told}"
    if target.variant == "i2_s":
        yield from iq2_bn_problem(min(source.shapes[name][-1] for name in source.ternary_names))


def _llama_cpp(source: Source, target: Target) -> Iterator[str]:
    if source.config.hidden_act != "silu":
        yield (
            f"{source.path / CONFIG}: hidden_act must be silu for llama.cpp, which takes any other model and computes "
            f"SiLU without a word, got {source.config.hidden_act}"
        )


def iq2_bn_problem(shortest: int) -> Iterator[str]:
    """Why ik_llama.cpp makes no IQ2_BN of a file whose shortest ternary row is this long."""
    if shortest < _IQ2_BN_ROW:
        yield f"IQ2_BN needs rows of at least {_IQ2_BN_ROW}, got {shortest}"


_IQ2_BN_ROW = 512  # the shortest row that ik_llama.cpp makes IQ2_BN of
READERS = (
    Reader("transformers", ("safetensors", "master"), _none),
    Reader("bitnet.cpp", ("i2_s",), _none),
    Reader("llama.cpp", ("tq1_0", "tq2_0", "f16", "bf16", "f32"), _llama_cpp),
    Reader(
        "ik_llama.cpp",
        ("i2_s", "f16", "bf16", "f32"),
        _ik_llama,
        {"i2_s": " (by its own llama-quantize to IQ2_BN)"},
    ),
)
