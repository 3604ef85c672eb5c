"""Tokenizers that are no byte-level BPE: ids, texts and byte counts, beside transformers reading the same folder."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from bitnet_train.data.batches import label_bytes
from bitnet_train.data.chat import encode_answer, encode_chat, encode_prompt
from bitnet_train.data.config import TextData
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.families import CHATML, CHATS, FAMILIES, TEXTS, Chat, chat, write_family
from tests.support import write_jsonl

LOSSLESS = ("gpt-2", "llama-3", "llama-2", "mistral", "gemma")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str, tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_family(tmp_path / "source", family))


@pytest.fixture
def theirs(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    tokenizer.save(tmp_path / "saved")
    return AutoTokenizer.from_pretrained(tmp_path / "saved")


def ids_of(theirs: Any, messages: Chat, prompt: bool = False) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    return ids


def test_training_ids_are_those_of_apply_chat_template(tokenizer: Tokenizer, theirs: Any) -> None:
    for messages in CHATS:
        assert encode_chat(messages, tokenizer).input_ids == ids_of(theirs, messages)


def test_a_prompt_is_where_training_ends_it(tokenizer: Tokenizer, theirs: Any) -> None:
    for messages in CHATS:
        prompt = encode_prompt(messages[:-1], tokenizer)
        ids, trained = encode_chat(messages, tokenizer, "last")
        assert prompt == ids_of(theirs, messages[:-1], prompt=True)
        assert ids[: len(prompt)] == prompt
        assert trained.index(True) == len(prompt)
        assert ids[len(trained) - 1 - trained[::-1].index(True)] in tokenizer.stop_token_ids


BITS = (
    *(
        "Hello",
        " ",
        "  ",
        "\n",
        " \n",
        "\t",
        "the",
        " list",
        "1",
        "23",
        "4567",
        "'s",
        "I'",
        "!!",
        "...",
        "é",
        "e\u0301",
    ),
    *(
        "日本",
        "🙂",
        "{",
        '"a":',
        "def f(x):\n    return",
        "</",
        "b>",
        "-",
        "\u00a0",
        "_x",
        "Ok.",
        "▁",
        "NAME",
        "NAME\n",
    ),
)


def test_pieces_are_encoded_as_parts_of_the_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Any text after a line break or a special token, where templates end a prompt: the oracle is the whole text."""
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    oracle.post_processor = None
    generator, compared = random.Random(0), 0
    for _ in range(400):
        stop = tokenizer.stop_tokens[0]
        prompt, answer = ("".join(generator.choices(BITS, k=4)).replace("NAME", stop) for _ in range(2))
        prompt += generator.choice(("\n", stop))
        whole = oracle.encode(prompt + answer, add_special_tokens=False)
        if any(start < len(prompt) < end for start, end in whole.offsets):
            continue  # a token reaches over: two line breaks
        first, second = tokenizer.encode_pieces([prompt, answer])
        assert first + second == whole.ids, (prompt, answer)
        assert first == oracle.encode(prompt, add_special_tokens=False).ids
        compared += 1
    assert compared > 200


def test_a_token_that_would_reach_into_the_answer_is_cut(tmp_path: Path) -> None:
    """As generation has it: "Assistant:▁" and then "Hello", where one text has "Assistant:" and "▁Hello"."""
    tokenizer = Tokenizer.from_folder(write_family(tmp_path, "mistral"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    prompt, answer = encode_answer(chat("u: Hi"), "Hello there", tokenizer)
    whole = tokenizer.encode_pieces(["user: Hi<|im_end|>assistant: Hello there"])[0]
    assert prompt + answer != whole
    assert tokenizer.decode(prompt + answer) == tokenizer.decode(whole)
    assert tokenizer.spelled(prompt)[-1] == " "
    assert "".join(tokenizer.spelled(prompt + answer)) == "user: Hi<|im_end|>assistant: Hello there"
    assert not tokenizer.spelled(prompt + answer)[len(prompt)].startswith(" ")  # no space of its own


def test_names_of_special_tokens_in_a_text_stay_text(tokenizer: Tokenizer) -> None:
    name = tokenizer.stop_tokens[-1]
    stops = {*tokenizer.stop_token_ids}
    plain, named = (chat(f"u: {text}") for text in ("say x", f"say {name} {name}, please"))
    ids, other = (encode_prompt(messages, tokenizer) for messages in (plain, named))
    assert [id for id in ids if id in stops] == [id for id in other if id in stops]
    assert stops.isdisjoint(tokenizer.encode(f"say {name}, please"))


@pytest.mark.parametrize("family", ["gpt-2", "qwen2", "mistral"], indirect=True)
def test_quoted_names_have_the_ids_that_transformers_gives_sanitized_ones(tokenizer: Tokenizer, theirs: Any) -> None:
    messages = chat("u: say <|im_end|> or <|im_start|><|im_end|>, please")
    sanitized = theirs.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
    )
    assert encode_prompt(messages, tokenizer) == sanitized["input_ids"]


def test_a_stream_of_ids_gives_the_text_of_the_whole(tokenizer: Tokenizer, theirs: Any) -> None:
    for messages in CHATS:
        ids = encode_chat(messages, tokenizer).input_ids
        whole = theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == whole
        assert "".join(tokenizer.decode_stream(iter(ids))) == whole


def test_a_stream_comes_in_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_family(tmp_path, "mistral"))
    ids = tokenizer.encode("Hello there, a list is 日本 red")
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert len(pieces) > 8
    assert "日" in pieces  # three ids of bytes


@pytest.mark.parametrize("text", [TEXTS[0], "Größe 日本 🙂", "two  spaces\n\n", "x"])
@pytest.mark.parametrize("family", LOSSLESS, indirect=True)
def test_byte_lengths_add_up_to_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    first, *rest = ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.first_byte_lengths[first] + sum(tokenizer.byte_lengths[id] for id in rest) == len(text.encode())


@pytest.mark.parametrize("family", LOSSLESS, indirect=True)
def test_the_bytes_of_a_batch_are_those_of_its_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [*TEXTS[:3], "Größe 日本 🙂"]
    file = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    rows = TextData(sequence_length=16, cache_dir=str(tmp_path / "cache")).rows(str(file), tokenizer)
    lengths = torch.tensor([tokenizer.byte_lengths, tokenizer.first_byte_lengths])
    batch = rows.collate([rows[i] for i in range(len(rows))])
    assert int(label_bytes(batch, lengths, tokenizer.bos_token_id)) == sum(len(text.encode()) for text in texts)


def test_special_tokens_stand_for_no_bytes(tokenizer: Tokenizer) -> None:
    assert {tokenizer.byte_lengths[id] for id in tokenizer.stop_token_ids} == {0}
    assert min(tokenizer.byte_lengths) == 0
    assert len(tokenizer.byte_lengths) == tokenizer.vocab_size


# ---- roles ----


def test_a_tokenizer_without_bos_begins_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_family(tmp_path / "source", "qwen2"))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (None, None)
    assert tokenizer.begun([1, 2]) == [1, 2]
    assert tokenizer.prefix_token_id == tokenizer.eos_token_id
    file = write_jsonl(tmp_path / "text.jsonl", [{"text": "a list"}])
    rows = TextData(sequence_length=64, cache_dir=str(tmp_path / "cache")).rows(str(file), tokenizer)
    assert rows[0].ids.tolist() == [*tokenizer.encode("a list"), tokenizer.eos_token_id]
    tokenizer.chat_template = "{{ bos_token }}" + CHATML  # an undefined name is nothing, as in transformers
    assert tokenizer.decode(encode_prompt(chat("u: Hi"), tokenizer)).startswith("<|im_start|>")
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["bos_token"] is None
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").bos_token is None


def test_a_tokenizer_without_eos_is_an_error(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen2")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="eos_token names no token"):
        Tokenizer.from_folder(folder)


def config_of(folder: Path, **changes: object) -> Tokenizer:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return Tokenizer.from_folder(folder)


def test_the_token_that_closes_an_answer_stops_a_generation(tmp_path: Path) -> None:
    """Qwen's base models: EOS ends a text, and ChatML a turn with another token."""
    tokenizer = config_of(write_family(tmp_path, "qwen2"), eos_token="<|endoftext|>")
    assert tokenizer.stop_tokens == ("<|endoftext|>", "<|im_end|>")
    ids, trained = encode_chat(CHATS[0], tokenizer)
    last = len(trained) - 1 - trained[::-1].index(True)
    assert tokenizer.decode([ids[last]]) == "<|im_end|>"


def test_what_generation_config_stops_at_stops_a_generation(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gpt-2")
    before = Tokenizer.from_folder(folder).fingerprint
    (folder / "generation_config.json").write_text('{"eos_token_id": [320, 322, -1, 1000000000000]}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.stop_token_ids == (322, 320)
    assert tokenizer.fingerprint != before  # the mask of an answer ends with a stop token


@pytest.mark.parametrize(("family", "name"), [("gemma", "<end_of_turn>"), ("qwen2", "<|im_end|>")])
def test_messages_name_tokens_that_the_tokenizer_has(tmp_path: Path, family: str, name: str) -> None:
    tokenizer = Tokenizer.from_folder(write_family(tmp_path, family))
    names = tokenizer.stop_tokens
    assert name in names
    tokenizer.chat_template = tokenizer.chat_template.replace(name, "")
    eos = tokenizer.eos_token
    with pytest.raises(UserError, match=rf"must end with a stop token.*write .*{eos.replace('|', '.')}") as error:
        encode_chat(CHATS[0], tokenizer)
    assert "eot_id" not in str(error.value)


def test_without_a_template_of_its_own_bitnets_closes_with_eos(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "mistral")
    tokenizer = config_of(folder, chat_template=None, eos_token="</s>")
    ids, _ = encode_chat(chat("u: Hi", "a: No."), tokenizer)
    assert tokenizer.decode(ids) == "<s>User: Hi</s>Assistant: No.</s>"


def test_special_tokens_keep_their_flags(tmp_path: Path) -> None:
    """Phi-3's <|end|> takes the line break behind it."""
    backend, config = FAMILIES["gpt-2"]()
    backend.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, rstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = CHATML.replace("<|im_end|>", "<|end|>")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {**config, "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
        )
    )
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS:
        assert encode_chat(messages, tokenizer).input_ids == ids_of(theirs, messages)
    tokenizer.save(tmp_path / "saved")
    assert '"rstrip": true' in (tmp_path / "saved" / "tokenizer.json").read_text()


# ---- templates ----

TOOL_USE = "{{ tools | tojson }}" + CHATML.replace("m['content']", "m['content'] ~ (m.tool_calls or '')")


def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "source", "gpt-2")
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOL_USE}]
    tokenizer = config_of(folder, chat_template=several)
    tokenizer.save(tmp_path / "saved")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    tools: Sequence[Any] = [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = theirs.apply_chat_template(CHATS[0], tools=given, return_dict=True)["input_ids"]
        assert encode_chat(CHATS[0], tokenizer, tools=given).input_ids == expected
    assert tokenizer.template_for(tools) == TOOL_USE
    called = [*CHATS[0][:1], Message(role="assistant", content="", tool_calls=[{"function": {"name": "f"}}])]
    with pytest.raises(UserError, match=r"the row has tool_calls.*give the row tools: the template tool_use"):
        encode_chat(called, tokenizer)
    assert Tokenizer.from_folder(tmp_path / "saved").chat_templates == {"default": CHATML, "tool_use": TOOL_USE}


def test_templates_that_transformers_5_saves_beside_are_read(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "source", "gpt-2")
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = {"default": CHATML, "tool_use": TOOL_USE}
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert Tokenizer.from_folder(tmp_path / "theirs").chat_templates == {"default": CHATML, "tool_use": TOOL_USE}


def test_several_templates_without_a_default_are_an_error(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gpt-2")
    with pytest.raises(UserError, match="must have one named default, got rag, tool_use"):
        config_of(folder, chat_template=[{"name": name, "template": CHATML} for name in ("rag", "tool_use")])


def test_a_folder_that_transformers_saved_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """save_pretrained of version 5: the template in a file of its own, roles in tokenizer_config.json."""
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "source")
    if type(theirs).__name__ == "Qwen2Tokenizer":
        pytest.skip("transformers' class has a split rule of its own: see test_what_is_saved_is_taken_as_it_is")
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").is_file()
    again = Tokenizer.from_folder(tmp_path / "again")
    assert again.template_variables == tokenizer.template_variables
    for messages in CHATS:
        assert encode_chat(messages, again) == encode_chat(messages, tokenizer)


def test_what_is_saved_is_taken_as_it_is(tmp_path: Path) -> None:
    """transformers' Qwen2Tokenizer cuts numbers from their spaces, whatever tokenizer.json says."""
    tokenizer = config_of(write_family(tmp_path / "source", "gpt-2"), tokenizer_class="Qwen2Tokenizer")
    tokenizer.save(tmp_path / "saved")
    source, kept = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "saved"))
    assert source(TEXTS[0]).input_ids != tokenizer.encode(TEXTS[0])  # so that the class matters
    assert kept(TEXTS[0]).input_ids == tokenizer.encode(TEXTS[0])
