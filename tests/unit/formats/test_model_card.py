"""YAML of strangers is read as far as it is small."""

from itertools import pairwise
from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.formats.model_card import read_yaml


def doubled(base: str, line: str) -> str:
    """Ten of the line before in every line."""
    letters = "abcdefghij"
    lines = [line.format(name=new, former=", ".join([f"*{old}"] * 10)) for old, new in pairwise(letters)]
    return "\n".join([base, *lines])


BOMBS = {
    "lists": doubled("a: &a [x, x, x]", "{name}: &{name} [{former}]"),
    "merges": doubled("a: &a {x: 1}", "{name}: &{name} {{<<: [{former}]}}"),
    "texts": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]",
    "a list in itself": "a: &a [*a]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_aliases_that_stand_for_too_much_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: must be YAML: more than 10,000,000 characters"):
        read_yaml(Path("config.yaml"), BOMBS[name])


def test_aliases_of_a_card_are_read() -> None:
    text = "a: &a {k: v}\nb: *a\nc: {<<: *a, d: [*a, *a]}"
    assert read_yaml(Path("f"), text) == {"a": {"k": "v"}, "b": {"k": "v"}, "c": {"k": "v", "d": [{"k": "v"}] * 2}}
    assert read_yaml(Path("f"), "") == read_yaml(Path("f"), "- 1") == {}


@pytest.mark.parametrize(
    "text", ["seed: 2024-99-99", "a: [", "a: " + "[" * 5000 + "]" * 5000, "a: " + "[" * 150 + "]" * 150, "\0"]
)
def test_what_is_no_yaml_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="f: must be YAML: "):
        read_yaml(Path("f"), text)
