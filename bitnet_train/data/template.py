"""Chat templates: jinja that writes a conversation as one text, and which parts of that text an assistant generates.

    User: Hi<|eot_id|>Assistant: Hello<|eot_id|>
                                 ===============    a span: the answer and its stop token, never the header

A template marks spans by {% generation %} ... {% endgeneration %}. Where it has no such block, a span begins where the
prompt ends that the template writes for the messages before it, and ends with the first stop token of the turn.

Templates are foreign code: they run in jinja's sandbox, as transformers runs them, and within bounds (`data.sandbox`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import NamedTuple, NoReturn, TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from bitnet_train.data.sandbox import BoundedEnvironment
from bitnet_train.errors import UserError

# Of microsoft/bitnet-b1.58-2B-4T, whose own template leaves BOS to the tokenizer. bitnet.cpp knows its chat format by
# the word in the comment.
BITNET_CHAT_TEMPLATE = (
    "{# BITNET #}{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

# Code points that Unicode keeps out of text mark places while a text is made: a span, a quoted name (`data.pieces`).
_SPAN_START, _SPAN_END, QUOTE_START, QUOTE_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_SPAN_EDGE = re.compile(f"([{_SPAN_START}{_SPAN_END}])")
MARKS = re.compile(f"[{_SPAN_START}-{QUOTE_END}]")
_SPELLED_EDGE = "\\ufdd"  # as `repr` shows both
_ARGUMENTS = '{"a": "b"}'

Span = tuple[int, int]
Message = Mapping[str, object]
Write = Callable[[Sequence[Message], bool], str]  # of messages, with the generation prompt behind them or not
T = TypeVar("T")


class Rendered(NamedTuple):
    """A conversation as text, and the character ranges [start, end) that an assistant generates, one per answer.

    The range of an answer that cannot be found is empty.
    """

    text: str
    spans: list[Span]


def render(
    messages: Sequence[Message],
    template: str,
    add_generation_prompt: bool = False,
    stops: Sequence[str] = (),
    **variables: object,
) -> Rendered:
    """The text of a conversation, as transformers' apply_chat_template renders it, and the spans of its answers.

    Args:
        messages: transformers' dictionaries; a key with the value None is left out, as transformers does.
        template: jinja.
        stops: names of the tokens that end an answer.
        variables: what else the template may use, such as bos_token.

    Raises:
        UserError: the template is wrong or refuses the messages.
    """
    spelled = repr((messages, variables))  # its length, and whether marks are in it, in a tenth of the time of a walk
    if _SPELLED_EDGE in spelled:
        messages, variables = with_strings(messages, _without_edges), with_strings(variables, _without_edges)
    write = _writer(template, variables, len(spelled), len(messages))
    marked = write(messages, add_generation_prompt)
    if _SPAN_START in marked:
        return _split_at_edges(marked)
    return Rendered(marked, list(_spans_after_prompts(messages, write, marked, stops)))


@lru_cache(maxsize=16)
def closing_token(template: str, names: re.Pattern[str], **variables: object) -> str | None:
    """The first special token that the template writes after an answer; None where it writes none.

    Args:
        names: matches the name of a special token.
    """
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = _writer(template, variables)(probe, False)
    except UserError:  # a template may want other messages than these
        return None
    text = _SPAN_EDGE.sub("", text)
    name = names.search(text, text.rfind("answer")) if "answer" in text else None
    return None if name is None else name[0]


def writes_as_bitnet(template: str) -> bool:
    """Whether a template writes what BitNet's does, BOS aside."""
    probe = [{"role": role, "content": f" {role[:1]}\n"} for role in ("system", "user", "assistant", "tool", "user")]
    try:
        texts = [_writer(one, {"bos_token": ""})(probe, True) for one in (template, BITNET_CHAT_TEMPLATE)]
    except UserError:
        return False
    alike = _SPAN_EDGE.sub("", texts[0]) == _SPAN_EDGE.sub("", texts[1])
    return alike and not {"tools", "tool_calls"} & names_in(template)


def bitnet_template(ends_turns: bool) -> str:
    """BitNet's template, for a tokenizer that has <|eot_id|>, or for one whose turns end with EOS."""
    return BITNET_CHAT_TEMPLATE if ends_turns else BITNET_CHAT_TEMPLATE.replace("<|eot_id|>", "{{ eos_token }}")


def renewed(template: str, ends_turns: bool) -> str:
    """Today's text of BitNet's template for one that writes the same but for BOS; any other template as it is."""
    return bitnet_template(ends_turns) if writes_as_bitnet(template) else template


@lru_cache(maxsize=16)
def writes_strings(template: str, **variables: str) -> bool:
    """Whether a template writes arguments of tool calls that are JSON as they are; `tojson` would encode them again."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": _ARGUMENTS}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    probe: list[Message] = [{"role": "user", "content": "question"}, answer]
    try:
        return _ARGUMENTS in _writer(template, variables)(probe, False)
    except UserError:  # it wants an object
        return False


def with_strings(value: T, change: Callable[[str], str]) -> T:
    """The value with every string in it changed, at any depth, names of fields excepted."""
    if isinstance(value, str):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: with_strings(part, change) for key, part in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [with_strings(part, change) for part in value]  # type: ignore[return-value]
    return value


@lru_cache(maxsize=16)
def names_in(template: str) -> set[str]:
    """The variables that a template reads, and its words: a field is written as `.tool_calls` or as ['tool_calls']."""
    _compile(template)
    words = set(re.findall(r"\w+", template)) - {"tools"}
    return words | meta.find_undeclared_variables(_environment().parse(template))


def _writer(template: str, variables: Mapping[str, object], characters: int = 0, count: int = 0) -> Write:
    """Renders a conversation of so many characters and messages, or its beginning, within bounds that fit them."""
    compiled, environment = _compile(template), _environment()
    given = {"tools": None, "documents": None, **variables}

    def write(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        environment.allow(characters, count)
        present = [_as_transformers(message) for message in messages]
        try:
            return compiled.render(given, messages=present, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UserError(f"chat_template: {error}") from None
        except Exception as error:  # foreign code
            raise UserError(f"chat_template: {error} ({type(error).__name__})") from None

    return write


def _without_edges(text: str) -> str:
    return _SPAN_EDGE.sub("", text) if _SPAN_START in text or _SPAN_END in text else text


def _as_transformers(message: Mapping[str, object]) -> dict[str, object]:
    """A message as transformers hands it to a template: no null, and its reasoning under both names in use."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = present.get("reasoning_content")
    return present if reasoning is None else {"thinking": reasoning, **present}


def _split_at_edges(marked: str) -> Rendered:
    text, spans, start = "", [], 0
    for part in _SPAN_EDGE.split(marked):
        if part == _SPAN_START:
            start = len(text)
        elif part == _SPAN_END:
            spans.append((start, len(text)))
        else:
            text += part
    return Rendered(text, spans)


def _spans_after_prompts(
    messages: Sequence[Message],
    write: Write,
    text: str,
    stops: Sequence[str],
) -> Iterator[Span]:
    """A span for each answer: from where its prompt ends to the first stop token of its turn.

    An answer is not found, and its span is empty, where the prompt changes with what follows (Mistral's system message
    stands in the last question) or no stop token ends the turn.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [write(messages[:index], True) for index in answers]
    starts = [len(prompt) if text.startswith(prompt) else None for prompt in prompts]
    names = "|".join(map(re.escape, stops)) or "(?!)"
    stop = re.compile(f"(?<!{QUOTE_START})(?:{names})(?!{QUOTE_END})")  # one in a message is quoted
    end = 0
    following = [*starts, None][1:]
    for index, start, next_start in zip(answers, starts, following, strict=True):
        found = None
        if start is not None:
            limit = _end_of_turn(messages, index, write, text, next_start)
            found = stop.search(text, start, limit)
            end = start
        start, end = end, end if found is None else found.end()
        yield start, end


def _end_of_turn(messages: Sequence[Message], index: int, write: Write, text: str, next_start: int | None) -> int:
    """Where the turn of a message ends at the latest.

    The turn that a template writes for the last answer may be another one than in the middle of a conversation (Qwen3's
    has thoughts): then the turn ends before the next prompt does.
    """
    if index < len(messages) - 1:
        turn = write(messages[: index + 1], False)
        if text.startswith(turn):
            return len(turn)
    return len(text) if next_start is None else next_start


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: its output between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_SPAN_START, _SPAN_END))
        return [before, *body, after]


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    _environment().allow(len(template))  # what is constant is computed here
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat_template: line {error.lineno}: {error}") from None
    except Exception as error:  # a break outside of a loop, a tower of brackets, a number of 5,000 digits
        raise UserError(f"chat_template: {type(error).__name__}: {error}") from None


@cache
def _environment() -> BoundedEnvironment:
    """The environment that transformers documents for chat templates: sandboxed, blocks trimmed; with bounds."""
    environment = BoundedEnvironment(
        {"tojson": _to_json}, trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
