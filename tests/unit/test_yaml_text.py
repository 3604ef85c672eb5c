from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.yaml_text import check_yaml

BOMB = "x: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"y{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
)
CHAIN = "y0: &a0 [1]\n" + "".join(f"y{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
TOO_LARGE = {
    "aliases of aliases": BOMB,
    "a chain of aliases": CHAIN,
    "a list that holds itself": "x: &a [*a]\n",
    "a long text many times": f"s: &a {'x' * 100_000}\nt: [{','.join(['*a'] * 100)}]\n",
    "nested": f"s: {'[' * 5000}{']' * 5000}\n",
    "mappings in one another": "".join(f"{' ' * i}k:\n" for i in range(60)),
    "long": f"s: {'x' * (1 << 20)}\n",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_would_take_memory_is_refused_before_it_does(name: str) -> None:
    with pytest.raises(UserError, match=r"^r\.yaml: must (hold|have) at most .*; shorten it$"):
        check_yaml(Path("r.yaml"), TOO_LARGE[name])


@pytest.mark.parametrize(
    "text",
    ["", "a: 1\n", "x: &a [1, 2]\ny: *a\nz: {k: *a}\n", f"s: {'[' * 48}{']' * 48}\n", "x: &a long\ny: [*a, *a]\n"],
)
def test_what_people_write_is_let_through(text: str) -> None:
    check_yaml(Path("r.yaml"), text)


@pytest.mark.parametrize(
    ("text", "line"), [("a: 1\nseed: [\n", 3), ("a: 1\nb: 'x\n", 3), ("a: b: c\n", 1), ("\ta: 1\n", 1)]
)
def test_broken_yaml_is_one_line_with_its_number(text: str, line: int) -> None:
    with pytest.raises(UserError, match=rf"^r\.yaml: line {line}: must be YAML: [^\n]*; mend the file$"):
        check_yaml(Path("r.yaml"), text)
