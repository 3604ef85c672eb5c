"""Rows to conversations: every field is used, refused, or told."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitnet_train.data.cache import tokenized
from bitnet_train.data.chat import encode_chat, encode_pair
from bitnet_train.data.conversation import Message, messages_of, text_of, tools_of, unread_of_conversation
from bitnet_train.data.encoding import ChatEncoder, Encoder, PairEncoder, TextEncoder
from bitnet_train.data.notices import say_once
from bitnet_train.data.preference import Pair, pair_of, unread_of_pair
from bitnet_train.data.sources import Row
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from tests.support import tiny_tokenizer, write_jsonl

ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WRITES_ALL = (  # the reasoning of the last answer alone, as in Qwen3's; tools, calls
    "{% if tools %}{{ tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content | trim + '</think>' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def row(**fields: object) -> Row:
    return Row("rows.jsonl", 7, fields)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WRITES_ALL
    return tokenizer


def trained(tokenizer: Tokenizer, train_on: str = "assistant", **fields: object) -> str:
    """The text that carries loss, with # between answers."""
    read = row(**fields)
    ids, flags = encode_chat(messages_of(read), tokenizer, train_on, tools_of(read))
    parts: list[list[int]] = [[]]
    for id, flag in zip(ids, flags, strict=True):
        parts[-1:] = [[*parts[-1], id]] if flag else [parts[-1], []] if parts[-1] else [[]]
    return "#".join(tokenizer.decode(part) for part in parts if part)


def said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


# ---- texts ----


def test_text_of() -> None:
    assert text_of(row(text=" as it is\n", id=3)) == " as it is\n"
    assert text_of(row(text="")) == ""


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"content": "a", "id": 1}, r'^rows\.jsonl:7: no field "text"; the row has content, id$'),
        ({"text": None}, r"^rows\.jsonl:7: text must be a string, got null"),
        ({"text": ["a"]}, "got a list"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": "a\ud800b"}, "lone surrogates"),
    ],
)
def test_bad_texts(bad: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_of(row(**bad))


# ---- conversations ----

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "shape",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None}], "conversations": None},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": 1},
        {"conversations": [USER, ASSISTANT]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_shapes_of_conversations(shape: dict[str, object]) -> None:
    assert said(messages_of(row(**shape))) == [("user", "Q"), ("assistant", "A")]
    with_system = said(messages_of(row(**shape, system="S")))
    assert with_system == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_the_input_of_alpaca_follows_the_instruction() -> None:
    assert messages_of(row(instruction="Q", input="I", output="A"))[0]["content"] == "Q\n\nI"


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_tools_may_answer_between_two_messages_of_the_assistant() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    answer = {"role": "tool", "content": "2", "name": "f"}
    messages = messages_of(row(messages=[USER, call, answer, answer, ASSISTANT, USER, ASSISTANT]))
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}
    assert messages[2] == messages[3] == answer
    turns = [("human", "Q"), ("function_call", "f(1)"), ("observation", "2"), ("gpt", "A")]
    sharegpt = messages_of(row(conversations=[{"from": role, "value": text} for role, text in turns]))
    assert [message["role"] for message in sharegpt] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_a_list_or_the_json_of_one(given: object) -> None:
    assert tools_of(row(tools=given)) == TOOLS


@pytest.mark.parametrize("given", [None, [], "", "[]"])
def test_no_tools(given: object) -> None:
    assert tools_of(row(tools=given)) is None
    assert tools_of(row()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[", r"^rows\.jsonl:7: tools is no JSON"),
        ({"name": "f"}, r"^rows\.jsonl:7: tools must be a list of objects, .*got an object"),
        ('"f"', "got a string"),
        (["f"], "tools must be a list of objects"),
    ],
)
def test_bad_tools(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tools_of(row(tools=given))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"text": "a", "id": 1}, r"^rows\.jsonl:7: no conversation: looked for .*the row has text, id$"),
        ({}, "no fields"),
        ({"messages": []}, "messages must be a list of messages, got an empty list"),
        ({"messages": "hi"}, "messages must be a list of messages, got a string"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"messages\[1\]\.content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"content must be a string, got null"),
        ({"messages": [USER, {"role": "assistant"}]}, r"content must be a string, got null"),
        ({"messages": [USER, {"role": "assistant", "content": [{"text": "A"}]}]}, "must be a string, got a list"),
        ({"messages": [USER, {"role": "bot", "content": "A"}]}, r"messages\[1\]\.role must be one of .*, got 'bot'"),
        ({"messages": [USER, {"role": "tool", "content": "A"}]}, r"take turns, user first; turn 2 is tool"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "f()"}]}, r"\[1\]\.tool_calls must be a list of obj"),
        ({"messages": [USER, ASSISTANT, {"role": "tool", "content": "A", "name": 3}]}, r"\[2\]\.name must be a string"),
        ({"messages": [{"content": "A"}]}, "got None"),
        ({"conversations": [{"from": "bot", "value": "A"}]}, r"conversations\[0\]\.from must be one of .*, got 'bot'"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "first and the only one"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "first and the only one"),
        ({"messages": [SYSTEM, USER]}, "no assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": "a\0"}]}, "NUL"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc80"}]}, "lone surrogates"),
        ({"instruction": "Q", "output": ""}, "output is empty"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "input must be a string, got an integer"),
        ({"prompt": "Q", "completion": None}, "no conversation"),
    ],
)
def test_bad_conversations(shape: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        messages_of(row(**shape))
    assert str(caught.value).startswith("rows.jsonl:7: ")


# ---- reasoning ----


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_under_any_of_its_names(tokenizer: Tokenizer, name: str) -> None:
    said = SAID | {name: " two and two\n"}
    assert trained(tokenizer, messages=[ASKED, said]) == "<think>two and two</think>4<|eot_id|>"
    assert trained(tokenizer, conversations=[{"from": "human", "value": "2+2?"}, said]) == (
        "<think>two and two</think>4<|eot_id|>"
    )


def test_reasoning_that_the_template_does_not_write_is_an_error(tokenizer: Tokenizer) -> None:
    said = SAID | {"reasoning_content": "two and two"}
    with pytest.raises(UserError, match="the row has reasoning_content, which the template does not write"):
        encode_chat(messages_of(row(messages=[ASKED, said])), tiny_tokenizer())
    with pytest.raises(UserError, match=r"leaves out the reasoning of an answer that is trained.*data.train_on=last"):
        trained(tokenizer, messages=[ASKED, said, ASKED, said])
    assert trained(tokenizer, "last", messages=[ASKED, said, ASKED, said]) == "<think>two and two</think>4<|eot_id|>"
    with pytest.raises(UserError, match=r"messages\[0\].thinking stands in a message of user"):
        messages_of(row(messages=[ASKED | {"thinking": "hm"}, SAID]))


def test_null_and_empty_reasoning_is_none(tokenizer: Tokenizer) -> None:
    for nothing in (None, ""):
        assert trained(tokenizer, messages=[ASKED, SAID | {"reasoning_content": nothing}]) == "4<|eot_id|>"


def test_answers_that_differ_in_reasoning_alone_are_a_pair(tokenizer: Tokenizer) -> None:
    chosen, rejected = ([SAID | {"reasoning_content": thought}] for thought in ("two and two", "a guess"))
    pair = pair_of(row(prompt=[ASKED], chosen=chosen, rejected=rejected))
    _, *answers = encode_pair(pair, tokenizer)
    assert [tokenizer.decode(ids) for ids in answers] == [
        "<think>two and two</think>4<|eot_id|>",
        "<think>a guess</think>4<|eot_id|>",
    ]


# ---- what is trained ----


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_an_answer_with_a_flag_carries_no_loss(tokenizer: Tokenizer, flag: dict[str, object]) -> None:
    wrong = SAID | {"content": "5"}
    messages = [ASKED | flag, wrong | flag, ASKED, SAID | dict.fromkeys(flag, 1)]
    assert trained(tokenizer, messages=messages) == "4<|eot_id|>"
    assert "5" not in trained(tokenizer, "all", messages=messages)
    assert "user" in trained(tokenizer, "all", messages=messages)
    with pytest.raises(UserError, match="no answer of the conversation is to be trained"):
        trained(tokenizer, "last", messages=[ASKED, SAID, ASKED, wrong | flag])


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": 2}, {"train": "no"}])
def test_a_flag_is_yes_or_no(flag: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"messages\[1\]\.\w+ must be 0 or 1 \(false or true\).*got"):
        messages_of(row(messages=[ASKED, SAID | flag]))


def test_only_answers_are_trained() -> None:
    with pytest.raises(UserError, match=r"messages\[0\].train is true, but only answers are trained, got role user"):
        messages_of(row(messages=[ASKED | {"train": True}, SAID]))
    messages_of(row(messages=[ASKED | {"train": False, "weight": 1}, SAID]))


def test_the_template_does_not_see_flags(tokenizer: Tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson + '<|eot_id|>' }}{% endfor %}"
    assert "weight" not in trained(tokenizer, "all", messages=[ASKED, SAID | {"weight": 1}])
    assert "train" not in trained(tokenizer, "all", messages=[ASKED, SAID | {"weight": 0}, ASKED, SAID])


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_a_completion_that_nobody_should_learn_is_refused(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(UserError, match=rf"rows.jsonl:7: {name} is false"):
        messages_of(row(prompt="Hi", completion="Go away.", **{name: False}))
    good = row(prompt="Hi", completion="Hello.", **{name: True})
    assert messages_of(good)[1]["content"] == "Hello."
    assert list(unread_of_conversation(good.fields)) == []
    for yes in (1, "true"):
        assert len(messages_of(row(prompt="Hi", completion="Hello.", **{name: yes}))) == 2
    for no in (0, 0.0, "False"):
        with pytest.raises(UserError, match=rf"{name} is false"):
            messages_of(row(prompt="Hi", completion="Hello.", **{name: no}))
    named = row(prompt="Hi", completion="Hello.", **{name: "greeting"})
    assert list(unread_of_conversation(named.fields)) == [name]  # a class of something else


# ---- Alpaca ----


def test_alpacas_history_comes_first() -> None:
    fields = {"instruction": "And of Spain?", "input": "One word.", "output": "Madrid.", "system": "Be brief."}
    history = [["Capital of Italy?", "Rome."], ["Of France?", "Paris."]]
    found = [(m["role"][0], m["content"]) for m in messages_of(row(**fields, history=history))]
    assert found == [
        ("s", "Be brief."),
        *[("u", "Capital of Italy?"), ("a", "Rome."), ("u", "Of France?"), ("a", "Paris.")],
        *[("u", "And of Spain?\n\nOne word."), ("a", "Madrid.")],
    ]
    assert messages_of(row(**fields, history=[])) == messages_of(row(**fields, history=None))
    with pytest.raises(UserError, match=r"history\[0\] must be \[question, answer\]"):
        messages_of(row(**fields, history=[["Capital of Italy?"]]))


# ---- tools ----

ARGUMENTS = {"city": "Oslo", "days": [1, None]}


def call(arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, indent=1)])
def test_arguments_are_encoded_once(tokenizer: Tokenizer, arguments: object) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    assert trained(tokenizer, messages=[ASKED, said]) == f"{json.dumps(ARGUMENTS)}<|eot_id|>"


@pytest.mark.parametrize(
    "writes",
    [
        "{{ a if a is string else (a | tojson) }}",  # Qwen3's
        "{{ a }}",
        "{{ '' + a }}",  # DeepSeek's
    ],
)
def test_a_template_that_writes_strings_as_they_are_gets_them(writes: str) -> None:
    tokenizer = tiny_tokenizer()
    block = "{% set a = call.function.arguments %}" + writes
    tokenizer.chat_template = WRITES_ALL.replace("{{ call.function.arguments | tojson }}", block)
    said = {"role": "assistant", "content": None, "tool_calls": [call('{"city":"Oslo"}')]}
    assert trained(tokenizer, messages=[ASKED, said]) == '{"city":"Oslo"}<|eot_id|>'


def test_arguments_that_are_no_json_stay_text(tokenizer: Tokenizer) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [call("print(1)")]}
    assert trained(tokenizer, messages=[ASKED, said]) == '"print(1)"<|eot_id|>'


def test_content_beside_calls_is_trained_or_the_row_is_refused(tokenizer: Tokenizer) -> None:
    said = {"role": "assistant", "content": "I look.", "tool_calls": [call(ARGUMENTS)]}
    assert trained(tokenizer, messages=[ASKED, said]) == f"I look.{json.dumps(ARGUMENTS)}<|eot_id|>"
    other = tiny_tokenizer()
    other.chat_template = WRITES_ALL.replace("{{ m.content }}{% for", "{{ '' if m.tool_calls else m.content }}{% for")
    assert trained(other, messages=[ASKED, said | {"content": ""}]) == f"{json.dumps(ARGUMENTS)}<|eot_id|>"
    with pytest.raises(UserError, match="leaves out the content of an answer that has tool_calls"):
        trained(other, messages=[ASKED, said])


def test_thoughts_within_content_are_not_lost(tokenizer: Tokenizer) -> None:
    """Qwen3's template takes them out of earlier answers."""
    other = tiny_tokenizer()
    cut = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    other.chat_template = WRITES_ALL.replace("{{ m.content }}{% for", cut + "{% for")
    said = SAID | {"content": "<think>\ntwo and two\n</think>4"}
    assert trained(other, messages=[ASKED, said]) == "<think>\ntwo and two\n</think>4<|eot_id|>"
    with pytest.raises(UserError, match="leaves out the reasoning"):
        trained(other, messages=[ASKED, said, ASKED, SAID])


# ---- fields that are not done here ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ["a.png"]}, "images: the model reads text alone"),
        ({"functions": [{"name": "f"}]}, "functions: .*call the field tools"),
        ({"documents": [{"title": "t"}]}, "documents: templates get no documents"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: templates get no variables"),
    ],
)
def test_a_field_that_means_something_else_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"^rows.jsonl:7: {message}"):
        messages_of(row(messages=[ASKED, SAID], **fields))
    with pytest.raises(UserError, match=rf"^rows.jsonl:7: {message}"):
        pair_of(row(prompt="Hi", chosen="a b", rejected="c d", **fields))
    messages_of(row(messages=[ASKED, SAID], **dict.fromkeys(fields)))  # null


def test_an_old_name_within_a_message_is_refused() -> None:
    with pytest.raises(UserError, match=r"messages\[1\].function_call: that is OpenAI's old name"):
        messages_of(row(messages=[ASKED, SAID | {"function_call": {"name": "f", "arguments": "{}"}}]))


# ---- fields that mean nothing ----


def test_what_is_not_read_is_told(tokenizer: Tokenizer) -> None:
    shapes: list[dict[str, object]] = [
        {"messages": [ASKED | {"id": 1}, SAID | {"refusal": None}], "prompt": "2+2?", "prompt_id": "x", "score": None},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "score": 1}], "tools": "[]"},
        {"instruction": "a", "input": "", "output": "b", "history": None, "system": "s", "text": "whole"},
        {"prompt": [ASKED], "completion": "4", "source": "web"},
    ]
    assert [sorted(unread_of_conversation(fields)) for fields in shapes] == [
        ["messages[].id", "prompt", "prompt_id"],
        ["conversations[].score"],
        ["text"],
        ["source"],
    ]
    assert messages_of(row(prompt="a", completion="b", system_prompt="Be brief."))[0]["content"] == "Be brief."
    pair = {
        "prompt": "a",
        "system_prompt": "s",
        "chosen": [SAID | {"score": 3}],
        "rejected": "c",
        "score_chosen": 3.0,
        "messages": [ASKED],
    }
    assert sorted(unread_of_pair(pair)) == ["chosen[].score", "messages", "score_chosen"]


@pytest.mark.parametrize(
    ("encoder", "fields", "unread"),
    [
        (TextEncoder, {"text": "a"}, "id, source"),
        (ChatEncoder, {"prompt": "a", "completion": "b"}, "id, source"),
        (PairEncoder, {"prompt": "a", "chosen": "b", "rejected": "c"}, "id, source"),
    ],
)
def test_columns_not_read_are_named_once_a_start(
    encoder: type[Encoder],
    fields: dict[str, object],
    unread: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [fields, {**fields, "id": 1}, {**fields, "source": "web", "id": 2}, {**fields, "none": None}]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for num_proc in (1, 2, 1):  # built twice, and read from the cache
        say_once.cache_clear()
        for _ in ("train", "val"):
            tokenized([file], encoder(tiny_tokenizer()), tmp_path / f"cache{num_proc}", num_proc)
        assert capsys.readouterr().err == f"data: {file}: columns not read: {unread}\n"


# ---- the prompt of a pair ----

QUESTION = "What colour has the sky?"


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": QUESTION},
        {"question": QUESTION},
        {"query": QUESTION},
        {"input": QUESTION},
        {"instruction": QUESTION},
        {"instruction": QUESTION, "input": "", "history": []},
        {"messages": [{"role": "user", "content": QUESTION}]},
        {"conversations": [{"from": "human", "value": QUESTION}]},
    ],
)
def test_a_prompt_under_another_name_is_the_prompt(prompt: dict[str, object]) -> None:
    """Not what both answers begin with, "It is "."""
    pair = pair_of(row(**prompt, chosen="It is blue.", rejected="It is green.", system="Be brief."))
    assert pair == Pair(
        prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        chosen=[{"role": "assistant", "content": "It is blue."}],
        rejected=[{"role": "assistant", "content": "It is green."}],
    )


@pytest.mark.parametrize("other", [{"question": "What?"}, {"input": "x"}, {"messages": [ASKED, SAID]}])
def test_whole_conversations_need_no_prompt_beside_them(other: dict[str, object]) -> None:
    """As in orpo-dpo-mix and UltraFeedback: other columns repeat, or tell, what the conversations hold."""
    whole = {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "5"}]}
    for answers in (
        whole,
        {name: f"\n\nHuman: 2+2?\n\nAssistant: {text}" for name, text in {"chosen": 4, "rejected": 5}.items()},
    ):
        pair = pair_of(row(**answers, **other))
        assert (pair.prompt, pair.chosen) == ([ASKED], [SAID])
        assert list(unread_of_pair({**answers, **other})) == list(other)


def test_alpacas_history_belongs_to_the_prompt() -> None:
    fields = {"instruction": "And of Spain?", "input": "", "history": [["Capital of Italy?", "Rome."]]}
    pair = pair_of(row(**fields, chosen="Madrid.", rejected="Rome."))
    assert [m["content"] for m in pair.prompt] == ["Capital of Italy?", "Rome.", "And of Spain?"]


def test_a_prompt_under_a_name_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UserError, match="stand without a prompt, and ask may be it; call that field prompt"):
        pair_of(row(ask=QUESTION, chosen="It is blue.", rejected="It is green."))
    pair = pair_of(row(id="a1", source="web", chosen="The sky is blue.", rejected="The sky is green."))
    assert pair.prompt == [{"role": "user", "content": "The sky is "}]
