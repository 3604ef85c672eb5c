"""Rows to preference pairs, in the shapes that people have."""

import pytest

from bitnet_train.data.conversation import Message
from bitnet_train.data.preference import Pair, pair_of
from bitnet_train.data.sources import Row
from bitnet_train.errors import UserError


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


SYSTEM = Message(role="system", content="S")
PAIR = Pair([user("Q")], [assistant("good")], [assistant("bad")])
LONG = Pair([SYSTEM, user("Q1"), assistant("A1"), user("Q2")], [assistant("good")], [assistant("bad")])


CALL = Message(role="assistant", content="", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])


def pair(**fields: object) -> Pair:
    return pair_of(Row("pairs.jsonl", 3, fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "score": 3},
        {"prompt": PAIR.prompt, "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"prompt": "Q", "chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt + PAIR.rejected},
        {"prompt": PAIR.prompt, "chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt + PAIR.rejected},
        {"prompt": PAIR.prompt, "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt + PAIR.rejected, "prompt": None},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    ],
)
def test_shapes_of_one_question(fields: dict[str, object]) -> None:
    assert pair(**fields) == PAIR


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": LONG.prompt, "chosen": LONG.chosen, "rejected": LONG.rejected},
        {"prompt": LONG.prompt[1:], "chosen": LONG.chosen, "rejected": LONG.rejected, "system": "S"},
        {"prompt": "Q2", "chosen": LONG.prompt + LONG.chosen, "rejected": LONG.prompt + LONG.rejected},
        {"chosen": LONG.prompt + LONG.chosen, "rejected": LONG.prompt + LONG.rejected},
        {"chosen": LONG.prompt[1:] + LONG.chosen, "rejected": LONG.prompt[1:] + LONG.rejected, "system": "S"},
        {
            "chosen": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: good",
            "rejected": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: bad",
            "system": "S",
        },
    ],
)
def test_shapes_of_a_longer_conversation(fields: dict[str, object]) -> None:
    assert pair(**fields) == LONG


def test_the_shared_beginning_of_strings_ends_at_white_space() -> None:
    found = pair(chosen="Name a colour: green", rejected="Name a colour: grey")
    assert found == Pair([user("Name a colour: ")], [assistant("green")], [assistant("grey")])


def test_answers_may_differ_in_their_calls_and_follow_a_tool() -> None:
    prompt = [user("Q"), CALL, Message(role="tool", content="2")]
    other = Message(role="assistant", content="", tool_calls=[{"function": {"name": "g", "arguments": {}}}])
    assert pair(prompt=prompt, chosen=[CALL], rejected=[other]) == Pair(prompt, [CALL], [other])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Q", "chosen": "good"}, "no field 'rejected'; the row has prompt, chosen"),
        ({"prompt": "Q", "chosen": None, "rejected": "bad"}, "no field 'chosen'"),
        ({"prompt": "Q", "chosen": "", "rejected": "bad"}, "chosen is empty"),
        ({"prompt": "Q", "chosen": "good", "rejected": " "}, "rejected is empty"),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, "prompt is empty"),
        ({"prompt": "Q", "chosen": [], "rejected": PAIR.rejected}, "an empty list"),
        ({"prompt": "Q", "chosen": "same", "rejected": " same\n"}, "chosen and rejected are equal"),
        ({"chosen": "the same", "rejected": "the same"}, "chosen and rejected are equal"),
        ({"chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt + PAIR.chosen}, "are equal"),
        ({"chosen": "good", "rejected": "bad"}, "what chosen and rejected both begin with, is empty"),
        ({"chosen": "Q good", "rejected": "Q "}, "rejected is empty"),
        (
            {"chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt},
            "rejected must be one assistant .*got nothing",
        ),
        ({"chosen": [user("Q"), *PAIR.chosen], "rejected": [user("R"), *PAIR.rejected]}, "got user, assistant"),
        ({"prompt": "Q", "chosen": [CALL], "rejected": [CALL]}, "chosen and rejected are equal"),
        ({"prompt": "Q", "chosen": PAIR.chosen * 2, "rejected": PAIR.rejected}, "got assistant, assistant"),
        ({"prompt": [user("Q"), assistant("A")], "chosen": "good", "rejected": "bad"}, "end with a user message"),
        ({"prompt": [SYSTEM], "chosen": "good", "rejected": "bad"}, "end with a user message"),
        ({"chosen": PAIR.chosen, "rejected": PAIR.rejected}, "end with a user message"),
        ({"prompt": [user("Q"), SYSTEM], "chosen": "good", "rejected": "bad"}, "first and the only one"),
        (
            {"prompt": "other", "chosen": PAIR.prompt + PAIR.chosen, "rejected": PAIR.prompt + PAIR.rejected},
            "another prompt than the field prompt",
        ),
        ({"prompt": "Q", "chosen": "go\0d", "rejected": "bad"}, "NUL"),
    ],
)
def test_bad_pairs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pair(**fields)
    assert str(caught.value).startswith("pairs.jsonl:3: ")


def test_a_transcript_may_end_where_the_answer_begins() -> None:
    """As in Dahoas/full-hh-rlhf."""
    fields = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " What?"}
    pair = pair_of(Row("pairs.jsonl", 1, dict(fields)))
    assert pair.prompt == [{"role": "user", "content": "Hi"}]
    assert [message["content"] for message in (*pair.chosen, *pair.rejected)] == [" Hello.", " What?"]
