"""Chat templates: the text that transformers renders, and the spans of answers in it."""

import re
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from bitnet_train.data.conversation import Message
from bitnet_train.data.template import BITNET_CHAT_TEMPLATE, closing_token, render, writes_as_bitnet
from bitnet_train.data.tokenizer import BOS, EOS, EOT
from bitnet_train.errors import UserError
from tests import families
from tests.families import chat

TWO_TURNS = chat("s:  Be brief.\n", "u: What is it?", "a: Hello world", "u: And?", "a: It is.\n")
CHATS = [TWO_TURNS, TWO_TURNS[1:3], TWO_TURNS[:2], TWO_TURNS[2:], chat("u: <|eot_id|>{{ 1 }}", "a: <b>")]
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMES = re.compile(r"<\|?[\w_]+\|?>|</s>")


def test_the_template_of_bitnet() -> None:
    text, spans = render(TWO_TURNS, BITNET_CHAT_TEMPLATE, bos_token=BOS)
    assert text == BOS + (
        "System: Be brief.<|eot_id|>User: What is it?<|eot_id|>Assistant: Hello world<|eot_id|>"
        "User: And?<|eot_id|>Assistant: It is.<|eot_id|>"
    )
    assert [text[start:end] for start, end in spans] == ["Hello world<|eot_id|>", "It is.<|eot_id|>"]
    prompt = render(TWO_TURNS[:2], BITNET_CHAT_TEMPLATE, add_generation_prompt=True)
    assert prompt == ("System: Be brief.<|eot_id|>User: What is it?<|eot_id|>Assistant: ", [])


INDENTED = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{ loop.index }} {{ message | tojson }}
    {%- generation %}
    {{ message.content }}{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{%- if tools is not none or documents is not none %}never{% endif %}
{{ bos_token }}{% if add_generation_prompt %}>{% endif %}
"""


@pytest.mark.parametrize("template", [BITNET_CHAT_TEMPLATE, CHATML, INDENTED])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_text_and_spans_are_those_of_transformers(
    messages: list[Message], add_generation_prompt: bool, template: str
) -> None:
    special = {"bos_token": BOS, "eos_token": EOS}
    ours = render(messages, template, add_generation_prompt, [EOT], **special)
    render_theirs: Any = chat_template_utils.render_jinja_template
    (text,), (spans,) = render_theirs(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **special,
    )
    assert ours.text == text
    if "generation %}" in template:
        assert ours.spans == spans


def test_without_generation_blocks_a_span_goes_from_the_prompt_to_the_stop_token() -> None:
    text, spans = render(TWO_TURNS, CHATML, stops=[EOT])
    assert [text[start:end] for start, end in spans] == ["Hello world<|eot_id|>", "It is.\n<|eot_id|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat_template: line 1"),
        ("{{ raise_exception('no system message') }}", "chat_template: no system message"),
        ("{{ messages.append(1) }}", "chat_template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "chat_template: .*unsafe"),
        ("{{ 1 + none }}", "chat_template: unsupported operand"),
        ("{{ missing.field }}", "chat_template: 'missing' is undefined"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "chat_template: Range too big"),
        ("{% include 'other' %}", "chat_template: no loader"),
        ("{{ '{}'.format() }}", "chat_template: .*IndexError"),
        ("{% break %}", "chat_template: SyntaxError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat_template: .*RecursionError"),
    ],
)
def test_templates_that_fail_or_leave_the_sandbox(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(TWO_TURNS, template)


# ---- what is known of a template without rows ----


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (BITNET_CHAT_TEMPLATE, "<|eot_id|>"),
        (families.CHATML, "<|im_end|>"),
        (families.LLAMA_3, "<|eot_id|>"),
        (families.LLAMA_2, "</s>"),
        (families.GEMMA, "<end_of_turn>"),
        ("{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('tools are needed') }}", None),
    ],
)
def test_the_token_that_closes_an_answer(template: str, token: str | None) -> None:
    assert closing_token(template, NAMES, bos_token="<s>", eos_token="</s>") == token


OFFICIAL = (  # 2B4T's, which leaves BOS to whoever calls it
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def test_a_template_that_writes_bitnets_format_is_known() -> None:
    begun = OFFICIAL.replace("{{ message", "{{ (bos_token if loop.first else '') + message", 1)
    assert writes_as_bitnet(OFFICIAL)
    assert writes_as_bitnet(begun)
    assert writes_as_bitnet(BITNET_CHAT_TEMPLATE.replace("{# BITNET #}{{ bos_token }}", ""))
    for other in (families.CHATML, families.LLAMA_3, OFFICIAL.replace("trim", "upper"), "{% broken", ""):
        assert not writes_as_bitnet(other)


def test_a_template_of_ones_own_is_not_taken_for_bitnets() -> None:
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    for other in (OFFICIAL.replace(" | trim", ""), tools + OFFICIAL, OFFICIAL.replace("capitalize", "title") + " "):
        assert not writes_as_bitnet(other)


def test_bitnet_cpp_finds_the_word_by_which_it_knows_the_format() -> None:
    assert "BITNET" in BITNET_CHAT_TEMPLATE
    assert "BITNET" not in render(TWO_TURNS, BITNET_CHAT_TEMPLATE).text


def test_a_message_is_what_transformers_hands_to_a_template() -> None:
    """Nulls are left out, and reasoning has both names."""
    said: Any = {"role": "assistant", "content": "4", "reasoning_content": "two", "name": None}
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    render_theirs: Any = chat_template_utils.render_jinja_template
    (text,), _ = render_theirs([[said]], chat_template=template)
    found = render([said], template, stops=["}"])
    assert found.text == text.replace(', "name": null', "")
    assert '"thinking": "two"' in found.text
