"""Tokenizers whose rules would multiply a text are refused when they are read."""

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers
from tokenizers.normalizers import Replace

from bitnet_train.data.growth import check_growth
from bitnet_train.errors import UserError

BLANKS = [Replace(" " * count, f"<|blank_{count}|>") for count in range(80, 1, -1)]  # as GLM's tokenizers have them


@pytest.mark.parametrize(
    "rules",
    [
        [Replace("a", "aa")] * 34,
        [Replace("a", "bb"), Replace("b", "cc"), Replace("c", "d" * 20)],
        [Replace(Regex("[b-d]"), "bb")] * 34,
        [Replace(Regex("x*"), "y")] * 34,
        [Replace("", "y")] * 34,
        [Replace("a", "b" * 1000)],
    ],
)
def test_rules_that_multiply_a_text_are_refused(rules: list[normalizers.Normalizer]) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(rules)
    with pytest.raises(UserError, match=r"tokenizer\.json: normalizer: must make a text at most 64 times as long"):
        check_growth(backend)


def test_a_decoder_that_multiplies_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * 34)
    with pytest.raises(UserError, match=r"tokenizer\.json: decoder"):
        check_growth(backend)


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [normalizers.Prepend("▁"), Replace(" ", "▁")],
        [Replace("\n", "<n>"), Replace("\t", "<|tab|>"), *BLANKS],
        [Replace("``", '"'), Replace(Regex(" {2,}"), " "), normalizers.NFKD(), normalizers.Lowercase()],
    ],
)
def test_rules_of_real_tokenizers_pass(rules: list[normalizers.Normalizer]) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(rules)
    check_growth(backend)
