"""YAML of strangers is read as far as it is small."""

from itertools import pairwise
from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.formats.model_card import licence_of, read_yaml


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
    with pytest.raises(UserError, match=r"config\.yaml: must hold at most 100,000 values with its aliases expanded"):
        read_yaml(Path("config.yaml"), BOMBS[name])


def test_aliases_of_a_card_are_read() -> None:
    text = "a: &a {k: v}\nb: *a\nc: {<<: *a, d: [*a, *a]}"
    assert read_yaml(Path("f"), text) == {"a": {"k": "v"}, "b": {"k": "v"}, "c": {"k": "v", "d": [{"k": "v"}] * 2}}
    assert read_yaml(Path("f"), "") == read_yaml(Path("f"), "- 1") == {}


@pytest.mark.parametrize("text", ["seed: 2024-99-99", "a: [", "\0"])
def test_what_is_no_yaml_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"f: .*must be YAML: "):
        read_yaml(Path("f"), text)


def card(folder: Path, head: str) -> Path:
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    return folder


@pytest.mark.parametrize(
    ("head", "licence"),
    [("license: mit", "mit"), ("license: [mit]", None), ("- a", None), ("", None), ("license: 2024-01-01", None)],
)
def test_the_licence_is_a_text(tmp_path: Path, head: str, licence: str | None) -> None:
    assert licence_of(card(tmp_path, head)) == licence


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ("license: 2024-99-99", "month must be in 1..12"),
        ("license: !!timestamp x", "must be YAML"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("license: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: " + "[" * 3000 + "]" * 3000, "on at most 50 levels"),
        ("a: " + "[" * 200_000, "on at most 50 levels"),
        ("a: " + "{b: " * 150 + "}" * 150, "on at most 50 levels"),
        ("a: b\n" * 300_000, "must have at most 1,048,576 characters"),
        ("a: [", "must be YAML"),
    ],
)
def test_what_is_no_yaml_of_a_card_is_refused(tmp_path: Path, head: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"README\.md: .*{problem}") as error:
        licence_of(card(tmp_path, head))
    assert str(error.value).endswith(("; mend or remove it", "; mend the file", "; shorten it"))
