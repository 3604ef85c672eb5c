"""Rows that people wrote, in every shape; conversations rendered as transformers renders them; how full rows get.

Messages: ruff's pages about its rules (no download). The others come from packages; a test skips without its package.
"""

import json
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from bitnet_train.data.chat import encode_chat
from bitnet_train.data.config import ChatData
from bitnet_train.data.conversation import Message, messages_of, text_of, tools_of
from bitnet_train.data.packing import PackedRows
from bitnet_train.data.preference import pair_of
from bitnet_train.data.sources import Row, read_rows
from bitnet_train.data.template import BITNET_CHAT_TEMPLATE, render
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from tests.packages import member
from tests.support import write_jsonl

Rows = list[dict[str, Any]]
LLAMA_FACTORY, CHITCHAT = "llamafactory==0.9.5", "chitchat-dataset==0.9.0"


# ---- the rows ----


def llama_factory(name: str) -> Rows:
    rows: Rows = json.loads(member(LLAMA_FACTORY, f"data/{name}"))
    return rows


def rule_chats() -> Rows:
    """What ruff's pages answer about each rule, as {"messages"}; every third with a system message."""
    command = [sys.executable, "-m", "ruff", "rule", "--all", "--output-format", "json"]
    rules = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    chats = [[_message("user", f"What is {r['name']}?"), _message("assistant", r["explanation"])] for r in rules]
    system = _message("system", "Answer as ruff's documentation does.")
    return [{"messages": [system, *chat] if i % 3 == 0 else chat} for i, chat in enumerate(chats)]


def human_chats() -> Rows:
    """Two people's chats as {"conversations"}: what one says in a row is one message."""
    dialogs = json.loads(member(CHITCHAT, "dataset.json")).values()
    return [{"conversations": turns} for dialog in dialogs if len(turns := _turns(dialog["messages"])) > 1]


def _turns(blocks: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    said = [(entry["sender"], entry["text"].strip()) for block in blocks for entry in block if entry["text"].strip()]
    joined = ["\n".join(text for _, text in entries) for _, entries in groupby(said, key=lambda entry: entry[0])]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(joined)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def checked(tmp_path: Path, rows: Iterable[Mapping[str, object]]) -> list[Row]:
    """The rows after a journey through a file."""
    return list(read_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows))))


# ---- shapes ----


def test_texts(tmp_path: Path) -> None:
    topics = list(pydoc_data.topics.topics.values())
    assert [text_of(row) for row in checked(tmp_path, ({"text": t} for t in topics))] == topics


def test_messages(tmp_path: Path) -> None:
    rows = rule_chats()
    assert len(rows) > 900
    assert [messages_of(row) for row in checked(tmp_path, rows)] == [row["messages"] for row in rows]


@pytest.mark.slow
def test_sharegpt(tmp_path: Path) -> None:
    rows = human_chats()
    assert len(rows) >= 4000
    for row, found in zip(rows, map(messages_of, checked(tmp_path, rows)), strict=True):
        assert [message["content"] for message in found] == [turn["value"] for turn in row["conversations"]]


@pytest.mark.slow
def test_alpaca(tmp_path: Path) -> None:
    rows = llama_factory("alpaca_en_demo.json")
    found = [messages_of(row) for row in checked(tmp_path, rows)]
    assert [(m[0]["content"].split("\n\n")[0], m[1]["content"]) for m in found] == [
        (row["instruction"].split("\n\n")[0], row["output"]) for row in rows
    ]
    assert all(row["input"] in m[0]["content"] for row, m in zip(rows, found, strict=True))


@pytest.mark.slow
def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = llama_factory("alpaca_en_demo.json")
    renamed = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    assert [m[1]["content"] for m in map(messages_of, checked(tmp_path, renamed))] == [row["output"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["sharegpt", "strings", "messages", "implicit"])
def test_preferences(tmp_path: Path, shape: str) -> None:
    rows = [row for row in llama_factory("dpo_en_demo.json") if len(row["conversations"]) == 1]
    assert len(rows) >= 100
    found = [pair_of(row) for row in checked(tmp_path, [_preference(row, shape) for row in rows])]
    assert [(p.prompt[0]["content"], p.chosen[0]["content"], p.rejected[0]["content"]) for p in found] == [
        (row["conversations"][0]["value"], row["chosen"]["value"], row["rejected"]["value"]) for row in rows
    ]


def _preference(row: dict[str, Any], shape: str) -> dict[str, object]:
    prompt, chosen, rejected = (turn["value"] for turn in (*row["conversations"], row["chosen"], row["rejected"]))
    question, answers = _message("user", prompt), [_message("assistant", text) for text in (chosen, rejected)]
    return {
        "sharegpt": row,
        "strings": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "messages": {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]},
        "implicit": {"chosen": [question, answers[0]], "rejected": [question, answers[1]]},
    }[shape]


# ---- rendering ----

# Llama 3's own shape with a system message of its own; ChatML that lists tools; turns without any block.
LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start|>system\n\nToday is a day.<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
TOOLS = """{%- if tools %}
    {{- '<|start|>tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|eot_id|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant\n' }}
        {%- generation %}
            {{- message.content + '<|eot_id|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\n' + message.content + '<|eot_id|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"""
SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'Be kind.' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if loop.first %}<<SYS>> {{ system }} <</SYS>>\n{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    "{% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
render_theirs: Any = chat_template_utils.render_jinja_template
TEMPLATES = {"bitnet": BITNET_CHAT_TEMPLATE, "llama-3": LLAMA_3, "tools": TOOLS, "system": SYSTEM}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(pydoc_data.topics.topics.values(), 2048)


@pytest.fixture(scope="module")
def conversations() -> list[list[Message]]:
    """250 question-answer pages and, where their package can be had, 250 chats of many turns."""
    pages = [messages_of(Row("ruff", i, row)) for i, row in enumerate(rule_chats()[:250])]
    try:
        chats = human_chats()[:250]
    except pytest.skip.Exception:
        chats = []
    return pages + [messages_of(Row("chitchat", i, row)) for i, row in enumerate(chats)]


def theirs_of(tokenizer: Tokenizer, template: str, folder: Path) -> Any:
    tokenizer.save(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    return theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(
    name: str, tokenizer: Tokenizer, conversations: list[list[Message]], tmp_path: Path
) -> None:
    """transformers' text and spans, tokenized by transformers in pieces that begin and end where its spans do.

    Only the pieces differ from its own way, which is one string: see CONTRIBUTING, "Numerics that look odd". The next
    test compares with that one.
    """
    tokenizer.chat_template = TEMPLATES[name]
    theirs = theirs_of(tokenizer, TEMPLATES[name], tmp_path)
    for messages in conversations:
        ids, trained = encode_chat(messages, tokenizer)
        special = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
        (text,), (spans,) = render_theirs(
            [messages], chat_template=theirs.chat_template, return_assistant_tokens_mask=True, **special
        )
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        pieces = [theirs(text[a:b], add_special_tokens=False).input_ids for a, b in pairwise(edges)]
        expected = [id for piece in pieces for id in piece]
        mask = [bool(number % 2) for number, piece in enumerate(pieces) for _ in piece]
        assert ids == expected
        assert trained == mask


@pytest.mark.parametrize("name", ["llama-3", "tools"])
def test_where_headers_end_in_a_line_break_ids_are_those_of_one_string(
    name: str, tokenizer: Tokenizer, conversations: list[list[Message]], tmp_path: Path
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    theirs: Any = theirs_of(tokenizer, TEMPLATES[name], tmp_path)
    compared = 0
    for messages in conversations:
        if any(message["content"] != message["content"].strip() for message in messages):
            continue  # a line break of the content would join that of the header
        ids, trained = encode_chat(messages, tokenizer)
        out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == out["input_ids"]
        assert trained == [bool(flag) for flag in out["assistant_masks"]]
        compared += 1
    assert compared >= 200


@pytest.mark.slow
def test_tools_reach_the_template_as_in_transformers() -> None:
    names = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    rows = llama_factory("glaive_toolcall_en_demo.json")
    assert len(rows) >= 200
    for number, row in enumerate(rows):
        read = Row("glaive", number, row)
        messages, tools = messages_of(read), tools_of(read)
        assert tools == (json.loads(row["tools"]) or None)
        assert messages == [{"role": names[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        (text,), (spans,) = render_theirs(
            [messages], tools=tools, chat_template=TOOLS, return_assistant_tokens_mask=True
        )
        assert tuple(render(messages, TOOLS, tools=tools)) == (text, spans)


# ---- packing ----


@pytest.mark.slow
def test_rows_of_human_chats_are_at_least_97_percent_full(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = BITNET_CHAT_TEMPLATE
    path = write_jsonl(tmp_path / "chats.jsonl", human_chats())
    for sequence_length in (2048, 4096):  # of the same tokens
        rows = ChatData(sequence_length, cache_dir=str(tmp_path)).rows(str(path), tokenizer)
        assert isinstance(rows, PackedRows)
        assert rows.efficiency >= 0.97
        assert len(rows) > 100
