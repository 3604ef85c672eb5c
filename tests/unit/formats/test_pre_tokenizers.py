"""The names of GGUF for how a text is cut, both ways."""

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from bitnet_train.export.awkward import awkward_texts
from bitnet_train.formats.pre_tokenizers import LLAMA_3, PRE_TOKENIZERS, PreTokenizer, cuts_of, steps_of


def words(steps: dict[str, Any], text: str) -> list[str]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    read = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"pre_tokenizer": steps}))
    assert read.pre_tokenizer is not None
    return [word for word, _ in read.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("known", PRE_TOKENIZERS, ids=lambda known: known.name)
def test_the_steps_of_a_name_are_read_as_that_name(known: PreTokenizer) -> None:
    assert cuts_of(steps_of(known)) == known.cuts


def test_what_is_written_otherwise_cuts_alike() -> None:
    """As GPT-4's tokenizers have it: what does not match is removed, and everything matches."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Removed", "invert": True}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, last]}
    assert cuts_of(steps) == (LLAMA_3,)
    for text in awkward_texts(["<|eot_id|>"]):
        assert words(steps, text) == words(steps_of(PRE_TOKENIZERS[0]), text)


def test_byte_level_has_the_expression_of_gpt_2() -> None:
    gpt_2 = next(known for known in PRE_TOKENIZERS if known.name == "gpt-2")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(gpt_2.cuts[0]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in awkward_texts(["<|endoftext|>"]):
        assert [word for word, _ in split.pre_tokenize_str(text)] == words(steps_of(gpt_2), text)


@pytest.mark.parametrize(
    "steps",
    [
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}]},
    ],
)
def test_other_steps_have_no_expressions(steps: dict[str, Any]) -> None:
    assert cuts_of(steps) == ()
