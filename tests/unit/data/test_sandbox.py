"""Chat templates from strangers: what loops, grows or nests without end is one line, what a long chat needs passes."""

import json

import pytest

from bitnet_train.data.sandbox import BoundedEnvironment
from bitnet_train.data.template import BITNET_CHAT_TEMPLATE, render
from bitnet_train.errors import UserError
from tests.families import chat

HI = chat("u: hi")
MANY = "{% for i in range(99999) %}"
END = "{% endfor %}"
LONG = "{% set x = 'a' * 9000000 %}"
GROWING = "{%% set ns = namespace(x=%s, y=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}"
STEPS, LENGTH = "runs for more than 1,0", "a text of more than 10,000,"


def growing(start: str, step: str, end: str) -> str:
    return GROWING % (start, start, step) + end


NESTED = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MANY * 3 + END * 3, STEPS),
        (MANY + "{% for j in range(99999) if false %}" + END * 2, STEPS),
        (MANY + "{{ range(99999) | map('string') | select('equalto', 'x') | first }}" + END, STEPS),
        (LONG + MANY + "{{ 'b' in x }}" + END, STEPS),
        (LONG + MANY + "{{ x.find('b') }}" + END, STEPS),
        (LONG + MANY + "{% set y = x[1:] %}" + END, STEPS),
        (LONG + "{% macro f() %}" + MANY + "{{ x }}" + END + "{% endmacro %}{{ f() }}", STEPS),
        (growing("['a']", NESTED, "{{ ns.x }}"), STEPS),
        (growing("['a']", NESTED, "{{ ns.x | tojson }}"), STEPS),
        (growing("['a']", NESTED, "{{ ns.x == ns.y }}"), STEPS),
        (growing("('a',)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {ns.x: 1} }}"), STEPS),
        ("{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}", STEPS),
        ("{{ 'a' * 30000000000 }}", LENGTH),
        ("{{ [1] * 30000000000 }}", LENGTH),
        (growing("'aa'", "{% set ns.x = ns.x ~ ns.x %}", ""), LENGTH),
        (growing("'aa'", "{% set ns.x = ns.x + ns.x %}", ""), LENGTH),
        (growing("'aa'", "{% set ns.x = ns.x.replace('a', 'a' * 50) %}", ""), LENGTH),
        ("{{ messages | tojson(indent=1000000000) }}", LENGTH),
        ("{{ 'a' | center(30000000000) }}", LENGTH),
        ("{{ 'a'.rjust(30000000000) }}", LENGTH),
        ("{{ '%30000000000d' % 5 }}", LENGTH),
        ("{{ '%*d' % (30000000000, 5) }}", LENGTH),
        ("{{ '{:30000000000}'.format(5) }}", LENGTH),
        ("{{ '{:{}}'.format(5, 30000000000) }}", LENGTH),
        ("{{ '%30000000000d' | format(5) }}", LENGTH),
        (LONG + "{{ range(99999) | join(x) }}", LENGTH),
        (LONG + "{{ x.join(['a', 'b', 'c']) }}", LENGTH),
        (LONG + "{{ 'a\nb\nc' | indent(x) }}", LENGTH),
        ("{{ (range(50000) | batch(1) | list) | sum(start=[]) | length }}", LENGTH),
        ("{{ [1] | batch(30000000000, 'x') | list }}", LENGTH),
        ("{% filter center(30000000000) %}a{% endfilter %}", LENGTH),
        ("{{ (9 ** 9999) ** 9999 }}", "a number of more than"),
        (growing("9999", "{% set ns.x = ns.x * ns.x %}", ""), "a number of more than"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "RecursionError"),
        ("{{ " + "9" * 6000 + " }}", "ValueError"),
        ("{{ 'a'.encode('nope') }}", "LookupError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ lipsum(n=1000000000) }}", "'lipsum' is undefined"),
    ],
)
def test_a_template_that_takes_too_much_is_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        render(HI, template)
    assert str(error.value).startswith("chat_template: ")
    assert "\n" not in str(error.value)


def test_what_a_template_may_do_is_as_in_jinja() -> None:
    template = (
        "{{ 'a' ~ 1 ~ none }} {{ 'a' * 3 }} {{ 2 ** 10 }} {{ '%s-%03d' % ('a', 7) }} {{ '{:>4}'.format(5) }} "
        "{{ 7 % 4 }} {{ [1] + [2] }} {{ (1, 2) }} {{ 'abc'[1:] }} "
        "{{ 'x' in 'xyz' }} {{ ['a', 'b'] | join('-') }} "
        "{{ messages | map(attribute='role') | join(',') }} {{ [1, 2] | sum }} {{ 'a' | center(5) }}| "
        "{{ 2.5 | round }} {{ [3, 1] | sort }} {{ {'a': [1]} | tojson(indent=1) }} "
        "{{ 'ab' | replace('a', 'c') }} {{ [1, 2] | last }}"
        "{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.last }}{% endfor %}"
        "{% autoescape true %}{{ '<' ~ 'a' }}{% endautoescape %}"
    )
    assert render(HI, template).text == (
        "a1None aaa 1024 a-007    5 3 [1, 2] (1, 2) bc True a-b user 3   a  | 2.0 "
        '[1, 3] {\n "a": [\n  1\n ]\n} cb 21False3True&lt;a'
    )


def test_a_long_conversation_and_large_tools_pass() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"number {i} " * 9} for i in range(10_000)]
    tools = [{"name": f"f{i}", "description": "d" * 150, "parameters": {"a": {"type": "string"}}} for i in range(1000)]
    gathering = (
        "{{ tools | tojson(indent=4) }}{% set ns = namespace(text='') %}"
        "{% for m in messages %}{% set ns.text = ns.text ~ m.content %}{% endfor %}"
        "{% generation %}{{ ns.text }}{% endgeneration %}"
    )
    text = render(messages, BITNET_CHAT_TEMPLATE, bos_token="", eos_token="").text
    assert text.count("<|eot_id|>") == len(messages)
    assert render(messages[:2000], gathering, tools=tools).text == json.dumps(tools, indent=4) + "".join(
        message["content"] for message in messages[:2000]
    )


LOOKING_BACK = (
    "{% generation %}{% endgeneration %}{% for m in messages %}{% for earlier in messages[: loop.index0] %}"
    "{% if earlier.role == 'tool' %}x{% endif %}{% endfor %}{% endfor %}"
)


def test_a_template_may_look_at_all_earlier_messages() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": ""} for i in range(1500)]
    assert render(messages, LOOKING_BACK).text == ""


def test_steps_for_pairs_of_messages_have_an_end() -> None:
    environment = BoundedEnvironment({})
    environment.allow(0, 10)
    assert environment.steps == 1_000_000 + 20 * 45
    environment.allow(0, 1_000_000)
    assert environment.steps == 26_000_000


def test_one_rendering_takes_nothing_from_the_next() -> None:
    with pytest.raises(UserError, match=STEPS):
        render(HI, MANY * 3 + END * 3)
    assert render(HI, MANY + END + "x").text == "x"
