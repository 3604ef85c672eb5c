r"""How a text is cut into words before merging: `pre_tokenizer` of tokenizer.json, and llama.cpp's names for it.

GGUF holds no expressions, only a name, `tokenizer.ggml.pre`, behind which the runtimes have expressions of their own. A
wrong or absent name tokenises differently without an error (microsoft/BitNet#508).

    name          cuts, one after the other                        a word that is a token is not merged
    llama-bpe     LLaMA-3's                                        yes (ignore_merges)
    smaug-bpe     LLaMA-3's                                        no
    qwen2         Qwen2's: LLaMA-3's with single digits            no
    gpt-2         GPT-2's, which ByteLevel has built in            no
    smollm        every digit, then GPT-2's                        no

Names are here whose words are the expressions' on the awkward texts of `export.awkward`, in ik_llama.cpp 0.1.5. Those
behind `tekken` (Mistral Nemo), `gpt-4o` and `deepseek-v3` are approximations: marks of Indic and Thai words are cut
off, " ~/y" is cut elsewhere. Source: src/llama-vocab.cpp of ik_llama.cpp and llama.cpp, `llm_tokenizer_bpe`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


class PreTokenizer(NamedTuple):
    """A name that llama.cpp knows, the expressions behind it, and whether a word that is a token stays whole."""

    name: str
    cuts: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("llama-bpe", (LLAMA_3,), ignore_merges=True),
    PreTokenizer("smaug-bpe", (LLAMA_3,)),
    PreTokenizer("qwen2", (_QWEN_2,)),
    PreTokenizer("gpt-2", (_GPT_2,)),
    PreTokenizer("smollm", (_DIGIT, _GPT_2)),
)

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def cuts_of(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The expressions of a `pre_tokenizer` that ends with ByteLevel; empty where it is of another kind."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return ()
    cuts = [_cut_of(step) for step in steps[:-1]]
    cuts += [_GPT_2] if steps[-1].get("use_regex", True) else []
    return () if None in cuts else tuple(cut for cut in cuts if cut is not None)


def _cut_of(step: Mapping[str, Any]) -> str | None:
    """The expression of one step, None where no expression says the same."""
    if step.get("type") == "Digits":
        return _DIGIT if step.get("individual_digits") else None
    how = (step.get("behavior"), bool(step.get("invert")))
    if step.get("type") != "Split" or how not in (("Isolated", False), ("Removed", True)):
        return None
    expression = step.get("pattern", {}).get("Regex")
    # to keep the matches alone is to isolate them where every character is in one, which `\s+` at the end tells of
    whole = isinstance(expression, str) and expression.endswith(r"|\s+")
    return expression if whole or how[0] == "Isolated" else None


def steps_of(known: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` of tokenizer.json that cuts as this name does."""
    steps = [_step_of(cut) for cut in known.cuts if cut != _GPT_2]
    steps.append({**BYTE_LEVEL, "use_regex": _GPT_2 in known.cuts})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _step_of(cut: str) -> dict[str, Any]:
    if cut == _DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
