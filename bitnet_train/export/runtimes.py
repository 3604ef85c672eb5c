"""What other programs compute with an export, beside what was trained, on real text.

KL(ours, theirs)       mean over positions, nats: 1e-5 to 5e-3 for the same function (rounding is chaotic, a last
                       bit grows into another int8 code), above 1 for another function
top-1                  share of positions where both have the same likeliest token
bits per byte          - sum log2 p(token) / bytes of the text, theirs and ours
prompts, texts         ids of conversations and of awkward texts, and stop ids: see `tokenization`

transformers     packed folders, master folders
ik_llama.cpp     GGUF F16, BF16, F32; I2_S after its own llama-quantize, which makes IQ2_BN of it
llama.cpp        GGUF TQ1_0, TQ2_0; F16, BF16, F32 of silu models
"""

import importlib
import math
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export import llama_process
from bitnet_train.export.source import Source, open_source
from bitnet_train.export.targets import Target, iq2_bn_problem, readers
from bitnet_train.export.tokenization import TokenizerCheck, check_folder, check_gguf
from bitnet_train.formats.gguf_bitnet import gguf_name
from bitnet_train.formats.gguf_blocks import GGMLType
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.model.pretrained import load_weights

MAX_KL = 0.1  # nats: far above rounding, far below another function
_TOKENS = 256


class Agreement(NamedTuple):
    """How near two distributions over the next token are; see the module's text."""

    kl: float
    top1: float
    bits_per_byte: float
    our_bits_per_byte: float
    perplexity_ratio: float


class Line(NamedTuple):
    """A line about a runtime, and whether it agrees with what was trained."""

    text: str
    agrees: bool = True


@dataclass(frozen=True)
class Report:
    """The result of one runtime: its logits and its tokenizer beside ours, or why it was not run or not asked.

    `failed`: it cannot load or run the export.
    """

    runtime: str
    agreement: Agreement | None
    reason: str = ""
    tokenizer: TokenizerCheck | None = None
    failed: bool = False

    @property
    def agrees(self) -> bool:
        """False where the runtime computes another function or has other ids; one that was not run agrees."""
        return all(line.agrees for line in self.lines())

    def lines(self) -> list[Line]:
        """Its logits, prompts, texts and stop ids, a line each."""
        return [self._logits(), *self._ids()]

    def _logits(self) -> Line:
        if self.agreement is None:
            return Line(f"{self.runtime} {'failed' if self.failed else 'not run'}: {self.reason}", not self.failed)
        kl, top1, theirs, ours, _ = self.agreement
        figures = f"KL {kl:.2g} nats, top-1 {100 * top1:.1f} %, {theirs:.4f} bits per byte, ours {ours:.4f}"
        return Line(f"{self.runtime}: {figures}", kl < MAX_KL)

    def _ids(self) -> list[Line]:
        if self.tokenizer is None:
            told = f"{self.runtime}: prompts and texts not compared: {self.reason}"
            return [Line(told, not self.failed)] if self.agreement and self.reason else []
        parts = zip(self.tokenizer.lines(), self.tokenizer.agreements(), strict=True)
        return [Line(f"{self.runtime}: {text}", agrees) for text, agrees in parts]


class Sample(NamedTuple):
    """A text as `ids`, BOS first, the bytes of the text after it, and our logits float32 `(tokens, vocab)`."""

    ids: list[int]
    bytes: int
    logits: Tensor


def compare(source: Source | Path, written: Path, text: Path | None = None) -> Iterator[Report]:
    """Runs an export in every installed runtime that is meant for it, and the trained model here.

    Args:
        source: the model that was exported, or where it is.
        written: the folder or GGUF file.
        text: what to run; pages of Python's help if absent.
    """
    model = open_source(source) if isinstance(source, Path) else source
    candidates = _runtimes(model, written)
    installed = [runtime for runtime in candidates if llama_process.installed(runtime.package)]
    if not installed:
        yield Report(candidates[0].name, None, f"{candidates[0].package} is not installed")
        return
    sample = None
    for runtime in installed:
        tokenizer, reason, failed = None, "", False
        try:
            tokenizer = runtime.tokenizer(model.trained_tokenizer, written)
        except (llama_process.RuntimeFailure, UserError) as error:
            reason, failed = _in_one_line(error), isinstance(error, llama_process.RuntimeFailure)
        try:
            sample = sample or take_sample(model, text)
            logits = runtime.logits(written, sample.ids)
        except (llama_process.NotForThis, UserError) as error:
            yield Report(runtime.name, None, _in_one_line(error), tokenizer, failed)
        except llama_process.RuntimeFailure as error:
            yield Report(runtime.name, None, _in_one_line(error), tokenizer, failed=True)
        else:
            yield Report(runtime.name, agreement(sample, logits), reason, tokenizer, failed)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def take_sample(source: Source, text: Path | None) -> Sample:
    """The first tokens of a text and our logits for them.

    Raises:
        UserError: the model has no tokenizer, or the text cannot be read.
    """
    tokenizer = source.trained_tokenizer
    content = "\n".join(pydoc_data.topics.topics.values()) if text is None else _read(text)
    count = min(_TOKENS, source.config.max_position_embeddings)
    ids = tokenizer.begun(tokenizer.encode(content[: 32 * count]))[:count]
    with torch.inference_mode():
        logits = load_weights(source.config, source.weights)(torch.tensor([ids]))[0]
    return Sample(ids, len(tokenizer.decode(ids[1:]).encode()), logits.float())


def agreement(sample: Sample, logits: Tensor) -> Agreement:
    """Compares a runtime's logits `(tokens, vocab)` with ours."""
    ours, theirs = sample.logits.log_softmax(-1), logits.float().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    our_nll, their_nll = _nll_sum(sample, ours), _nll_sum(sample, theirs)
    bits = 1 / math.log(2) / sample.bytes
    ratio = math.exp((their_nll - our_nll) / (len(sample.ids) - 1))
    return Agreement(kl, top1, their_nll * bits, our_nll * bits, ratio)


def _nll_sum(sample: Sample, log_probabilities: Tensor) -> float:
    labels = torch.tensor(sample.ids[1:])[:, None]
    return -float(log_probabilities[:-1].gather(1, labels).sum())


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text}: cannot be read as UTF-8: {error}") from None


class _Runtime(NamedTuple):
    name: str
    package: str
    logits: Callable[[Path, list[int]], Tensor]

    def tokenizer(self, tokenizer: Tokenizer, written: Path) -> TokenizerCheck:
        """Compares its ids with those of training."""
        return check_folder(tokenizer, written) if written.is_dir() else check_gguf(tokenizer, written, self.package)


def _runtimes(model: Source, written: Path) -> list[_Runtime]:
    """Those that run an export as it was trained (`targets.READERS`), the usual one first."""
    if written.is_dir():
        return [_Runtime("transformers", "transformers", transformers_logits)]
    file = GGUFFile(written)
    kind = file.kind(gguf_name("model.layers.0.mlp.up_proj.weight"))
    llama = _Runtime("llama.cpp", llama_process.LLAMA, llama_logits)
    if kind in (GGMLType.TQ1_0, GGMLType.TQ2_0):
        return [llama]
    if kind == GGMLType.I2_S:
        return [_Runtime("ik_llama.cpp (IQ2_BN)", llama_process.IK_LLAMA, iq2_bn_logits)]
    able = readers(model, Target("gguf", kind.name.lower()))
    ik_llama = _Runtime("ik_llama.cpp", llama_process.IK_LLAMA, ik_llama_logits)
    return [runtime for runtime in (ik_llama, llama) if runtime.name in able]


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    """Logits float32 `(tokens, vocab)` of transformers, computed in the folder's dtype, and nothing compiled."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    except Exception as error:  # anything, of several libraries
        raise llama_process.RuntimeFailure(f"{type(error).__name__}: {error}") from error
    return logits


def ik_llama_logits(file: Path, ids: list[int]) -> Tensor:
    """Logits of ik_llama.cpp for a file of floats."""
    return torch.from_numpy(llama_process.ask(llama_process.IK_LLAMA, file, ids).logits)


def iq2_bn_logits(file: Path, ids: list[int]) -> Tensor:
    """Logits of ik_llama.cpp for an I2_S file, by way of IQ2_BN."""
    shortest = min(info.shape[-1] for info in GGUFFile(file).tensors.values() if info.kind == GGMLType.I2_S)
    for reason in iq2_bn_problem(shortest):
        raise llama_process.NotForThis(reason)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        quantized = Path(folder) / "iq2_bn.gguf"
        llama_process.ik_llama_quantize(file, quantized)
        return ik_llama_logits(quantized, ids)


def llama_logits(file: Path, ids: list[int]) -> Tensor:
    """Logits of llama.cpp."""
    return torch.from_numpy(llama_process.ask(llama_process.LLAMA, file, ids).logits)
