"""ik_llama.cpp computes with an exported GGUF file what was trained, and tokenises as the trained tokenizer does.

Whole models are compared by KL, for rounding is chaotic. Measured: 2e-4 nats for a tied and 3e-3 for an untied head,
I2_S (made IQ2_BN by the runtime) and floats alike; 3 for a wrong function, such as I2_S run as it is.
"""

import pydoc_data.topics
import random
import sys
from pathlib import Path

import pytest

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.template import render
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.export import export
from bitnet_train.export.llama_process import IK_LLAMA, RuntimeFailure, Text, ask, ik_llama_quantize
from bitnet_train.export.runtimes import agreement, compare, ik_llama_logits, iq2_bn_logits, take_sample
from bitnet_train.export.source import open_source
from tests.folders import TEXT, edit_config, write_master
from tests.integration.conftest import SHAPE, Trained

pytest.importorskip("ik_llama_cpp")
pytestmark = pytest.mark.runtime


@pytest.mark.parametrize(
    ("type", "fields", "bound"),
    [
        ("i2_s", {}, 5e-3),
        ("f16", {}, 5e-3),
        ("bf16", {}, 5e-3),
        ("f32", {}, 5e-3),
        ("i2_s", {"hidden_act": "silu"}, 5e-3),
        ("f16", {"hidden_act": "silu"}, 5e-3),
        ("f32", {"tie_word_embeddings": False}, 0.01),
    ],
)
def test_ik_llama_computes_the_trained_function(
    tmp_path: Path, type: str, fields: dict[str, int | str | bool], bound: float
) -> None:
    write_master(tmp_path / "master", SHAPE | fields)
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type=type)
    (tmp_path / "text").write_text(TEXT)
    (report,) = compare(tmp_path / "master", tmp_path / "model.gguf", tmp_path / "text")
    assert report.agreement is not None, report
    assert report.agreement.kl < bound
    if (
        bound < 0.01
    ):  # an untied head of random weights is three times as large as an embedding: perplexity moves by 1 %
        assert report.agreement.perplexity_ratio == pytest.approx(1, abs=0.01)


def test_an_untied_model_goes_to_iq2_bn_by_f16(tmp_path: Path) -> None:
    """I2_S is refused for it: bitnet.cpp would compute with the embedding."""
    write_master(tmp_path / "master", SHAPE | {"tie_word_embeddings": False})
    export(tmp_path / "master", tmp_path / "f16.gguf", format="gguf", type="f16")
    ik_llama_quantize(tmp_path / "f16.gguf", tmp_path / "iq2_bn.gguf")
    (tmp_path / "text").write_text(TEXT)
    sample = take_sample(open_source(tmp_path / "master"), tmp_path / "text")
    assert agreement(sample, ik_llama_logits(tmp_path / "iq2_bn.gguf", sample.ids)).kl < 0.01


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    ],
    ids=["linear", "yarn"],
)
def test_ik_llama_scales_positions_as_they_were_trained(tmp_path: Path, scaling: dict[str, object]) -> None:
    write_master(tmp_path / "master", SHAPE)
    edit_config(tmp_path / "master", rope_scaling=scaling)
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f32")
    (tmp_path / "text").write_text(TEXT)
    (scaled,) = compare(tmp_path / "master", tmp_path / "model.gguf", tmp_path / "text")
    edit_config(tmp_path / "master", rope_scaling=None)
    (unscaled,) = compare(tmp_path / "master", tmp_path / "model.gguf", tmp_path / "text")
    assert scaled.agreement is not None, scaled
    assert unscaled.agreement is not None, unscaled
    assert scaled.agreement.kl < 2e-3
    assert unscaled.agreement.kl > 5 * scaled.agreement.kl


@pytest.mark.parametrize("type", ["i2_s", "f16"])
def test_a_trained_model_keeps_its_perplexity(trained: Trained, tmp_path: Path, type: str) -> None:
    export(trained.folder, tmp_path / "model.gguf", format="gguf", type=type)
    (tmp_path / "text").write_text(trained.texts[0])
    (report,) = compare(trained.folder, tmp_path / "model.gguf", tmp_path / "text")
    assert report.agreement is not None, report
    assert report.agreement.kl < 5e-3
    assert report.agreement.perplexity_ratio == pytest.approx(1, abs=0.01)


def test_another_function_does_not_agree(tmp_path: Path) -> None:
    write_master(tmp_path / "master", SHAPE)
    write_master(tmp_path / "other", SHAPE)
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f16")
    (tmp_path / "text").write_text(TEXT)
    (report,) = compare(tmp_path / "other", tmp_path / "model.gguf", tmp_path / "text")
    assert not report.agrees
    assert report.lines()[0].text.startswith("ik_llama.cpp: KL ")
    assert not report.lines()[0].agrees


def test_a_file_that_the_runtime_cannot_load_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(RuntimeFailure, match="ended with"):
        ask(IK_LLAMA, tmp_path / "model.gguf", [1, 2])


def test_short_rows_are_not_run(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf")
    with pytest.raises(RuntimeFailure, match="IQ2_BN needs rows of at least 512, got 128"):
        iq2_bn_logits(tmp_path / "model.gguf", [1, 2])


def real_texts() -> list[str]:
    """Prose, code with its indentation, entities and emoji of many scripts, and texts with the names of tokens in them.

    All from the standard library and from rich, which this project installs.
    """
    from html.entities import html5

    from rich._emoji_codes import EMOJI

    pages = [page for topic in pydoc_data.topics.topics.values() for page in topic.split("\n\n\n") if page.strip()]
    code = [Path(sys.modules[name].__file__ or "").read_text() for name in ("random", "json", "tokenize", "typing")]
    generator = random.Random(0)
    symbols = list({*html5.values(), *EMOJI.values()})
    symbols.sort()
    texts = [page[:400] for page in generator.sample(pages, 120)]
    texts += [module[start : start + 300] for module in code for start in range(0, 6000, 400)]
    texts += ["".join(generator.sample(symbols, 12)) + " " + " ".join(generator.sample(symbols, 5)) for _ in range(40)]
    texts += [f"{page[:50]}<|eot_id|>{page[50:90]}<|begin_of_text|>  \t {page[90:120]}" for page in pages[:30]]
    return [
        *texts,
        *("", " ", "   ", "\n\n\n", "\t x", " leading", "trailing  ", "a  b   c", "1234567890", "it's I'LL"),
    ]


def test_the_runtime_tokenizes_conversations_as_we_do(tmp_path: Path) -> None:
    texts = real_texts()
    tokenizer = train_bpe(texts, 2000)
    tokenizer.save(tmp_path)
    write_master(tmp_path / "master", {"vocab_size": 2000}, with_tokenizer=False)
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f16", tokenizer=tmp_path)
    template = str(open_source(tmp_path / "model.gguf").tokenizer.gguf_metadata()["tokenizer.chat_template"])
    assert "generation %}" not in template  # llama.cpp's parsers do not know that tag
    chats = [[Message(role="user", content=text)] for text in texts]
    rendered = [render(chat, template, add_generation_prompt=True, bos_token="").text for chat in chats]
    assert len(rendered) >= 200
    assert rendered[0] == f"User: {texts[0].strip()}<|eot_id|>Assistant: "
    theirs = ask(IK_LLAMA, tmp_path / "model.gguf", [1], [Text(text, special=True) for text in rendered]).ids
    assert theirs == [tokenizer.encode_pieces([text])[0] for text in rendered]
    plain = [index for index, text in enumerate(texts) if "<|" not in text]
    assert [[tokenizer.bos_token_id, *theirs[index]] for index in plain] == [
        encode_prompt(chats[index], tokenizer) for index in plain
    ]
    as_text = ask(IK_LLAMA, tmp_path / "model.gguf", [1], [Text(text) for text in texts]).ids
    assert as_text == [tokenizer.encode(text) for text in texts]
    back = Tokenizer.from_folder(tmp_path / "model.gguf")
    assert as_text == [back.encode(text) for text in texts]
