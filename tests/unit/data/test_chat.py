"""Conversations to ids: the text that transformers renders, and a mask over answers and their stop tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from bitnet_train.data.chat import encode_chat, encode_pair, encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.preference import Pair
from bitnet_train.data.template import BITNET_CHAT_TEMPLATE, render
from bitnet_train.data.tokenizer import BOS, EOS, EOT, Tokenizer, train_bpe
from bitnet_train.errors import UserError

TEXTS = ["System: Be brief. User: What is it? Assistant: It is a word.", "Hello Hello Hello world"] * 20
TOKENIZER = train_bpe(TEXTS, 384)
BOS_ID = TOKENIZER.begun([])[0]
EOT_ID = TOKENIZER.stop_token_ids[1]
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETFUL = "{{ messages | length }}" + CHATML  # its text changes with what follows

Turn = tuple[str, str]


def chat(*turns: Turn) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(role=names[role], content=content) for role, content in turns]


def with_template(template: str) -> Tokenizer:
    tokenizer = train_bpe(TEXTS, 384)
    tokenizer.chat_template = template
    return tokenizer


def trained_parts(
    messages: Sequence[Message], tokenizer: Tokenizer = TOKENIZER, train_on: str = "assistant"
) -> list[str]:
    """The text of each run of trained ids."""
    ids, trained = encode_chat(messages, tokenizer, train_on)
    parts: list[list[int]] = [[]]
    for id, flag in zip(ids, trained, strict=True):
        if flag:
            parts[-1].append(id)
        elif parts[-1]:
            parts.append([])
    return [tokenizer.decode(part) for part in parts if part]


TWO_TURNS = chat(("s", " Be brief.\n"), ("u", "What is it?"), ("a", "Hello world"), ("u", "And?"), ("a", "It is.\n"))
CHATS = [TWO_TURNS, TWO_TURNS[1:3], TWO_TURNS[:2], TWO_TURNS[2:], chat(("u", "<|eot_id|>{{ 1 }}"), ("a", "<b>"))]


# ---- templates ----


def test_transformers_applies_the_saved_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = render(TWO_TURNS[:4], BITNET_CHAT_TEMPLATE, add_generation_prompt=True, bos_token=BOS).text
    assert theirs.apply_chat_template(TWO_TURNS[:4], tokenize=False, add_generation_prompt=True) == ours
    prompt = theirs.apply_chat_template(TWO_TURNS[:2], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(TWO_TURNS[:2], TOKENIZER) == prompt
    assert prompt.count(BOS_ID) == 1


def test_an_answer_that_cannot_be_found_may_not_be_trained() -> None:
    assert [start < end for start, end in render(TWO_TURNS, FORGETFUL, stops=[EOT]).spans] == [False, False]
    with pytest.raises(UserError, match=r"changes with what follows.*\{% generation %\}.*data.train_on=last"):
        encode_chat(TWO_TURNS, with_template(FORGETFUL))


SYSTEM_LAST = (  # Mistral's: the system message stands in the last message of the user, wherever that is
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] "
    "{% if m == messages[-1] or m == messages[-2] %}{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_the_last_answer_can_be_trained_where_earlier_ones_cannot_be_found() -> None:
    tokenizer = with_template(SYSTEM_LAST)
    assert trained_parts(TWO_TURNS, tokenizer, "last") == [f" It is.\n{EOS}"]
    with pytest.raises(UserError, match="changes with what follows"):
        encode_chat(TWO_TURNS, tokenizer)


# ---- conversations ----


def test_answers_and_their_stop_tokens_are_trained_and_headers_are_not() -> None:
    assert trained_parts(TWO_TURNS) == ["Hello world<|eot_id|>", "It is.<|eot_id|>"]
    assert trained_parts(TWO_TURNS, train_on="last") == ["It is.<|eot_id|>"]


def test_all_trains_everything_but_bos() -> None:
    ids, trained = encode_chat(TWO_TURNS, TOKENIZER, "all")
    assert trained == [False] + [True] * (len(ids) - 1)
    assert ids == encode_chat(TWO_TURNS, TOKENIZER).input_ids


def test_the_ids_spell_the_text_with_one_bos() -> None:
    ids = encode_chat(TWO_TURNS, TOKENIZER).input_ids
    assert TOKENIZER.decode(ids) == render(TWO_TURNS, BITNET_CHAT_TEMPLATE, bos_token=BOS).text
    assert ids.count(BOS_ID) == 1
    assert ids[0] == BOS_ID


def test_the_template_decides_about_bos() -> None:
    ids = encode_chat(TWO_TURNS, with_template(CHATML)).input_ids
    assert BOS_ID not in ids
    assert encode_chat(TWO_TURNS, with_template("{{ bos_token }}" + CHATML)).input_ids == [BOS_ID, *ids]


def test_the_header_is_not_joined_with_the_answer() -> None:
    joined = TOKENIZER.encode("Assistant: Hello")
    ids = encode_chat(TWO_TURNS, TOKENIZER).input_ids
    header, answer = TOKENIZER.encode("Assistant: "), TOKENIZER.encode("Hello")
    assert joined != header + answer  # so that the test below can fail
    start = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header)
    assert ids[start + len(header) :][: len(answer)] == answer


@pytest.mark.parametrize("tokenizer", [TOKENIZER, with_template(CHATML)], ids=["bitnet", "chatml"])
@pytest.mark.parametrize("answer", [2, 4])
def test_training_ids_begin_with_the_prompt_that_generation_sees(answer: int, tokenizer: Tokenizer) -> None:
    prompt = encode_prompt(TWO_TURNS[:answer], tokenizer)
    ids, trained = encode_chat(TWO_TURNS[: answer + 1], tokenizer, "last")
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=4))
def test_any_content_keeps_the_mask_and_the_prompt(contents: list[str]) -> None:
    messages = [turn for content in contents for turn in chat(("u", content), ("a", content))]
    ids, trained = encode_chat(messages, TOKENIZER)
    prompt = encode_prompt(messages[:-1], TOKENIZER)
    assert ids[: len(prompt)] == prompt
    assert ids.count(BOS_ID) == 1
    assert ids.count(EOT_ID) == 2 * len(contents)
    ends = [id for id, flag, after in zip(ids, trained, [*trained[1:], False], strict=True) if flag and not after]
    assert ends == [EOT_ID] * len(contents)


def test_names_of_special_tokens_in_a_message_stay_text() -> None:
    messages = chat(("u", f"{EOT}Assistant: yes{EOT}{BOS}"), ("a", f"no{EOT}User: I lied{EOS}"))
    ids, trained = encode_chat(messages, TOKENIZER)
    assert ids.count(EOT_ID) == 2
    assert ids.count(BOS_ID) == 1
    assert TOKENIZER.eos_token_id not in ids
    assert trained[-1]
    assert TOKENIZER.decode(ids) == render(messages, BITNET_CHAT_TEMPLATE, bos_token=BOS).text
    assert trained_parts(messages) == [f"no{EOT}User: I lied{EOS}{EOT}"]


def test_marks_in_a_message_do_not_move_spans() -> None:
    messages = chat(("u", "Q\ufdd1\ufdd0"), ("a", "\ufdd1A\ufdd0\ufdd2"))
    assert trained_parts(messages) == ["A<|eot_id|>"]


def test_the_mask_ends_on_the_stop_token() -> None:
    after = BITNET_CHAT_TEMPLATE.replace("<|eot_id|>{% endgeneration %}", "{% endgeneration %}<|eot_id|>")
    assert trained_parts(TWO_TURNS, with_template(after)) == ["Hello world<|eot_id|>", "It is.<|eot_id|>"]
    assert trained_parts(TWO_TURNS[1:3], with_template(CHATML)) == ["Hello world<|eot_id|>"]
    eos = with_template(BITNET_CHAT_TEMPLATE.replace("<|eot_id|>", "{{ eos_token }}"))
    assert trained_parts(TWO_TURNS, eos) == ["Hello world<|end_of_text|>", "It is.<|end_of_text|>"]


def test_a_template_without_stop_tokens_is_an_error() -> None:
    for template in (BITNET_CHAT_TEMPLATE, CHATML):
        with pytest.raises(UserError, match=r"must end with a stop token.*write <\|end_of_text\|> or <\|eot_id\|>"):
            encode_chat(TWO_TURNS, with_template(template.replace("<|eot_id|>", "\n")))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_nothing_to_train_on_is_an_error(train_on: str) -> None:
    with pytest.raises(UserError, match="no assistant message"):
        encode_chat(TWO_TURNS[:2], TOKENIZER, train_on)


def test_an_unknown_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match="train_on must be one of assistant, last, all, got 'user'"):
        encode_chat(TWO_TURNS, TOKENIZER, "user")


# ---- turns without {% generation %} ----

HARMONY = (  # gpt-oss's: earlier answers end with another token than the last
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
FOUR = chat(("u", "What is it?"), ("a", "Hello world"), ("u", "And?"), ("a", "It is."))


def test_a_span_ends_within_its_turn() -> None:
    tokenizer = with_template(HARMONY)
    assert trained_parts(FOUR, tokenizer, "last") == ["It is.<|end_of_text|>"]
    ids = encode_chat(FOUR, tokenizer, "last").input_ids
    text = render(FOUR, HARMONY, eos_token=EOS).text
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(encode_prompt(FOUR[:3], tokenizer)) == render(FOUR[:3], HARMONY, True).text
    with pytest.raises(UserError, match="its turn has no stop token"):
        encode_chat(FOUR, tokenizer)


def test_what_a_tool_says_is_never_trained() -> None:
    """LLaMA-3.1's: a call ends with another token than a turn."""
    template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
        "{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(template)
    assert trained_parts(TOOL_CHAT, tokenizer, "last") == ["It is 2.<|eot_id|>"]
    with pytest.raises(UserError, match="its turn has no stop token"):
        encode_chat(TOOL_CHAT, tokenizer)


def test_a_stop_token_that_an_answer_names_does_not_end_it() -> None:
    messages = chat(("u", f"Say {EOT}"), ("a", f"Well: {EOT}."), ("u", "And?"), ("a", EOT))
    tokenizer = with_template(CHATML)
    assert trained_parts(messages, tokenizer) == [f"Well: {EOT}.{EOT}", f"{EOT}{EOT}"]
    assert encode_chat(messages, tokenizer).input_ids.count(EOT_ID) == 4


def test_an_answer_that_is_not_trained_need_not_be_found() -> None:
    messages: list[Message] = [*FOUR[:1], {**FOUR[1], "train": False}, *FOUR[2:]]
    assert trained_parts(messages, with_template(HARMONY)) == ["It is.<|end_of_text|>"]
    with pytest.raises(UserError, match="its turn has no stop token"):
        encode_chat(messages, with_template(HARMONY), "all")  # where it must be left out of all


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"])
def test_a_mark_within_the_name_of_a_token_does_not_make_it_one(mark: str) -> None:
    messages = chat(("u", f"{EOT[:4]}{mark}{EOT[4:]}"), ("a", f"{mark}{EOT}{mark}"))
    for template in (BITNET_CHAT_TEMPLATE, CHATML):
        assert encode_chat(messages, with_template(template)).input_ids.count(EOT_ID) == 2


def test_a_template_that_takes_a_name_away_does_not_make_another() -> None:
    torn = CHATML.replace("message.content", f"message.content | replace('{EOT}', '')")
    messages = chat(("u", f"{EOT[:5]}{EOT}{EOT[5:]}"), ("a", "no"))
    assert encode_chat(messages, with_template(torn)).input_ids.count(EOT_ID) == 2


# ---- tools ----

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": f"Adds. {EOT}", "parameters": {"type": "object"}}}
]
WITH_TOOLS = """
{%- if tools %}{{ '<tools>' + (tools | tojson) + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
CALL = Message(
    role="assistant",
    content="",
    tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"x": [1, EOT]}}}],
)
TOOL_CHAT = [*chat(("u", "1 + 1?")), CALL, Message(role="tool", content="2", name="add"), *chat(("a", "It is 2."))]


def test_tools_calls_and_their_answers_are_rendered_as_in_transformers() -> None:
    render_theirs: Any = chat_template_utils.render_jinja_template
    for tools in (TOOLS, None):
        (text,), (spans,) = render_theirs(
            [TOOL_CHAT], tools=tools, chat_template=WITH_TOOLS, return_assistant_tokens_mask=True
        )
        assert tuple(render(TOOL_CHAT, WITH_TOOLS, tools=tools)) == (text, spans)


def test_ids_of_tools_are_those_of_transformers(tmp_path: Path) -> None:
    """With no name of a special token in a string: transformers would take it for the token."""
    clean: Any = json.loads(json.dumps([TOOLS, TOOL_CHAT]).replace(EOT, "end"))
    tokenizer = with_template(WITH_TOOLS)
    tokenizer.save(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    ids = encode_chat(clean[1], tokenizer, tools=clean[0]).input_ids
    assert tokenizer.decode(ids) == theirs.apply_chat_template(clean[1], tools=clean[0], tokenize=False)
    assert ids.count(EOT_ID) == theirs.apply_chat_template(clean[1], tools=clean[0])["input_ids"].count(EOT_ID) == 5


def test_calls_are_trained_and_what_tools_say_is_not() -> None:
    tokenizer = with_template(WITH_TOOLS)
    ids, trained = encode_chat(TOOL_CHAT, tokenizer, tools=TOOLS)
    parts = tokenizer.decode([id for id, flag in zip(ids, trained, strict=True) if flag])
    assert parts == '{"name": "add", "arguments": {"x": [1, "<|eot_id|>"]}}<|eot_id|>It is 2.<|eot_id|>'
    assert ids.count(EOT_ID) == 5  # its name within the tools and the call stays text
    prompt = encode_prompt(TOOL_CHAT[:3], tokenizer, TOOLS)
    assert ids[: len(prompt)] == prompt


def test_a_pair_sees_the_tools() -> None:
    tokenizer = with_template(WITH_TOOLS)
    prompt, chosen, _ = encode_pair(Pair(TOOL_CHAT[:1], [CALL], TOOL_CHAT[3:]), tokenizer, TOOLS)
    assert tokenizer.decode(prompt).startswith("<tools>")
    assert tokenizer.decode(chosen).startswith('{"name": "add"')


def test_a_template_that_would_leave_tools_out_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^chat_template: the row has tools, which the template does not write"):
        encode_chat(TWO_TURNS, TOKENIZER, tools=TOOLS)
    with pytest.raises(UserError, match="the row has tool_calls, which"):
        encode_chat(TOOL_CHAT, TOKENIZER)
    mentions = with_template("{# tools #}" + BITNET_CHAT_TEMPLATE.replace("User", "tools"))
    with pytest.raises(UserError, match="the row has tools, which"):
        encode_chat(TWO_TURNS, mentions, tools=TOOLS)


# ---- pairs ----


@pytest.mark.parametrize("tokenizer", [TOKENIZER, with_template(CHATML)], ids=["bitnet", "chatml"])
def test_a_pair_is_one_prompt_and_two_completions(tokenizer: Tokenizer) -> None:
    pair = Pair(TWO_TURNS[:4], chat(("a", "Hello")), chat(("a", "It is a word.")))
    prompt, chosen, rejected = encode_pair(pair, tokenizer)
    assert prompt == encode_prompt(pair.prompt, tokenizer)
    assert tokenizer.decode(chosen) == "Hello<|eot_id|>"
    assert tokenizer.decode(rejected) == "It is a word.<|eot_id|>"
    assert chosen[-1] == rejected[-1] == EOT_ID


def test_a_template_that_does_not_continue_the_prompt_is_an_error() -> None:
    tokenizer = with_template("{{ messages | length }}" + BITNET_CHAT_TEMPLATE)
    with pytest.raises(UserError, match="does not begin with its prompt"):
        encode_pair(Pair(TWO_TURNS[:2], chat(("a", "Hello")), chat(("a", "It is"))), tokenizer)
