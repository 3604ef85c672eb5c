"""The library's errors are one line; a key that the user presses and a mistake of ours are none of them."""

import pytest
from tokenizers import Tokenizer, models

from bitnet_train.errors import UserError
from bitnet_train.formats.tokenizer_faults import tokenizer_faults

PANIC = '{"version":"1.0","normalizer":{"type":"Precompiled","precompiled_charsmap":null},"model":{"type":"BPE"}}'


@pytest.mark.parametrize("text", ["{}", PANIC, '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_what_the_library_raises_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^f\.json: \S"), tokenizer_faults(lambda error: f"f.json: {error}"):
        Tokenizer.from_str(text)


def test_merges_without_their_tokens_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^f\.json: .*out of vocabulary"), tokenizer_faults(lambda e: f"f.json: {e}"):
        models.BPE(vocab={"a": 0}, merges=[("a", "b")])


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, UserError("said already"), SystemExit])
def test_other_errors_pass(error: type[BaseException] | BaseException) -> None:
    with pytest.raises(error if isinstance(error, type) else type(error)), tokenizer_faults(lambda _: "hidden"):
        raise error
