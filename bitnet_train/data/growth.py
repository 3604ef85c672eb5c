"""How much longer a tokenizer's rules can make a text, before any text is given to them.

Each of a chain of rules may double a text: 34 of them make 17 billion characters of one. The rules are tried on what
they look for and on what they put in its place, one after the other, so that nothing large is ever made.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import tokenizers
from tokenizers import normalizers

from bitnet_train.data.pieces import state_of
from bitnet_train.errors import UserError
from bitnet_train.formats.tokenizer_faults import tokenizer_faults

MOST = 64  # times as long; NFKD makes 18 characters of one, names such as <|blank_20|> stand for one, too
_PROBES = [chr(code) for code in range(32, 127)]


def check_growth(backend: tokenizers.Tokenizer) -> None:
    """Refuses a normalizer or a decoder that makes a text more than `MOST` times as long."""
    for part in ("normalizer", "decoder"):
        steps = list(_steps(json.loads(state_of(getattr(backend, part)))))
        longest = max(map(_longest, steps), default=0)
        if longest > MOST or (prod(max(_longest(step), 1) + 1 for step in steps) > MOST and _growth(steps) > MOST):
            raise UserError(
                f"tokenizer.json: {part}: must make a text at most {MOST} times as long; give a tokenizer that does"
            )


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The rules in order that put text in place of other text."""
    for inner in (step or {}).get("normalizers") or (step or {}).get("decoders") or ():
        yield from _steps(inner)
    if (step or {}).get("type") in ("Replace", "Precompiled"):
        yield step


def _longest(step: dict[str, Any]) -> int:
    """Characters that a rule writes at once."""
    if step["type"] == "Replace":
        return len(step["content"])
    charsmap = base64.b64decode(step["precompiled_charsmap"])  # the size of a trie, the trie, texts that end with NUL
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max((len(text.decode(errors="replace")) for text in texts.split(b"\0")), default=0)


def _growth(steps: Sequence[dict[str, Any]]) -> float:
    """How many times longer one of the probes becomes; rules that follow are not asked when it is too much."""
    replacing = [step for step in steps if step["type"] == "Replace"]
    patterns = [next(iter(step["pattern"].values())) for step in replacing]
    probes = {*_PROBES, *filter(None, patterns), *(letter for step in replacing for letter in step["content"])}
    texts = {probe: probe for probe in probes | {letter for pattern in patterns for letter in pattern}}
    growth = 1.0
    for step in steps:
        rule = normalizers.NFC()
        with tokenizer_faults(lambda error: f"tokenizer.json: normalizer: fails on a text ({error}); mend the file"):
            rule.__setstate__(json.dumps(step).encode())
            texts = {probe: rule.normalize_str(text) for probe, text in texts.items()}
        growth = max(len(text) / len(probe) for probe, text in texts.items())
        if growth > MOST:
            break
    return growth
