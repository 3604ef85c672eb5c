"""Conversations to token ids, and which of them an assistant said.

    User: Hi<|eot_id|>Assistant: Hello<|eot_id|>
    --------------------------------================    = trained: the answer and its stop token, never the header

A template marks the trained spans by {% generation %} ... {% endgeneration %}. The text is tokenized in pieces that
begin and end where spans do: when a model generates, the prompt ends after "Assistant: ", and a tokenizer that saw the
whole string would join that space with the first word of the answer, a token boundary that generation never meets.
(Microsoft's encoder tokenizes headers and contents apart, too.)

The names of special tokens inside a message stay text: nobody ends a turn by typing <|eot_id|>. transformers does the
same with sanitize_control_tokens=True, which is not its default.

The functions of a row's field "tools" and the `tool_calls` of messages reach the template as in transformers; a row
that has them and a template that does not write them is an error.

Source of the template: the model card of microsoft/bitnet-b1.58-2B-4T and the chat format of microsoft/BitNet.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitnet_train.data.preference import Pair
from bitnet_train.data.sources import Message
from bitnet_train.errors import UserError

if TYPE_CHECKING:
    from bitnet_train.data.tokenizer import Tokenizer

BITNET_CHAT_TEMPLATE = (
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
TRAIN_ON = ("assistant", "last", "all")

_START, _END = "\ufdd0", "\ufdd1"  # code points that Unicode keeps out of text: they stand around spans while rendering
_MARKS = re.compile(f"([{_START}{_END}])")

Span = tuple[int, int]
Tools = Sequence[object] | None  # JSON schemas of functions
T = TypeVar("T")


class Rendered(NamedTuple):
    """A conversation as text, and the character ranges [start, end) that an assistant generates."""

    text: str
    spans: list[Span]


class EncodedChat(NamedTuple):
    """Token ids of a conversation, and for each id whether it is trained."""

    input_ids: list[int]
    trained: list[bool]


def encode_chat(
    messages: Sequence[Message], tokenizer: "Tokenizer", train_on: str = "assistant", tools: Tools = None
) -> EncodedChat:
    """A conversation for SFT: one BOS, then the template's text.

    Args:
        train_on: `assistant`: every answer with its stop token; `last`: the last answer only; `all`: all but BOS.

    Raises:
        UserError: an unknown train_on, a template that fails, has no place for tools or does not close an answer with
            a stop token, or a conversation without anything to train on.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
    ids, spans = _encode(messages, tokenizer, tools)
    spans = [(start, _stop_index(ids, start, end, tokenizer) + 1) for start, end in spans]
    if not spans:
        raise UserError("the conversation has no assistant message to train on; drop the row")
    if train_on == "all":
        return EncodedChat(ids, [False] + [True] * (len(ids) - 1))
    trained = [False] * len(ids)
    for start, end in spans if train_on == "assistant" else spans[-1:]:
        trained[start:end] = [True] * (end - start)
    return EncodedChat(ids, trained)


def encode_prompt(messages: Sequence[Message], tokenizer: "Tokenizer", tools: Tools = None) -> list[int]:
    """A conversation that the assistant is to continue: one BOS, the template's text and its generation prompt.

    Followed by an answer and its stop token, these are the ids of `encode_chat`.
    """
    return _encode(messages, tokenizer, tools, add_generation_prompt=True)[0]


def encode_pair(pair: Pair, tokenizer: "Tokenizer", tools: Tools = None) -> tuple[list[int], list[int], list[int]]:
    """A preference for DPO: ids of the prompt (as `encode_prompt`), of chosen and of rejected, with their stop tokens.

    Raises:
        UserError: what `encode_chat` raises, and a template whose text of a prompt changes when an answer follows.
    """
    prompt = encode_prompt(pair.prompt, tokenizer, tools)
    chosen, rejected = (
        _completion(prompt, encode_chat([*pair.prompt, *completion], tokenizer, "last", tools))
        for completion in (pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected


def _completion(prompt: list[int], chat: EncodedChat) -> list[int]:
    end = len(chat.trained) - chat.trained[::-1].index(True)
    if chat.input_ids[: len(prompt)] != prompt:
        raise UserError(
            "chat_template: a conversation does not begin with its prompt; put {% generation %} around answers"
        )
    return chat.input_ids[len(prompt) : end]


def chat_pieces(
    messages: Sequence[Message], tokenizer: "Tokenizer", tools: Tools = None, add_generation_prompt: bool = False
) -> list[str]:
    """The template's text, cut where spans begin and end: every second piece is what an assistant generates.

    Each piece is tokenized on its own, with `parse_special`; names of special tokens in the messages are quoted.
    """
    _check_place_for_tools(messages, tools, tokenizer.chat_template)
    quoted, tools = _with_strings(messages, tokenizer.quote), _with_strings(tools, tokenizer.quote)
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    text, spans = render(quoted, tokenizer.chat_template, add_generation_prompt, tools=tools, **special)
    ends = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _encode(
    messages: Sequence[Message], tokenizer: "Tokenizer", tools: Tools, add_generation_prompt: bool = False
) -> tuple[list[int], list[Span]]:
    """Ids with one BOS in front, and the spans in ids."""
    texts = chat_pieces(messages, tokenizer, tools, add_generation_prompt)
    pieces = [tokenizer.encode(text, parse_special=True) for text in texts]
    if pieces[0][:1] != [tokenizer.bos_token_id]:
        pieces[0] = [tokenizer.bos_token_id, *pieces[0]]
    ids: list[int] = []
    id_spans: list[Span] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            id_spans.append((len(ids), len(ids) + len(piece)))
        ids += piece
    return ids, id_spans


def _check_place_for_tools(messages: Sequence[Message], tools: Tools, template: str) -> None:
    """transformers would leave out without a word what the template does not write."""
    calls = any(message.get("tool_calls") for message in messages)
    for name, given in (("tools", bool(tools)), ("tool_calls", calls)):
        if given and name not in _names_in(template):
            raise UserError(f"chat_template: the row has {name}, which the template does not write; give one that does")


def _with_strings(value: T, change: Callable[[str], str]) -> T:
    """The value with every string in it changed, at any depth, names of fields excepted."""
    if isinstance(value, str):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: _with_strings(part, change) for key, part in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [_with_strings(part, change) for part in value]  # type: ignore[return-value]
    return value


def _stop_index(ids: Sequence[int], start: int, end: int, tokenizer: "Tokenizer") -> int:
    """Where an answer stops: its stop token is the last one within the span, or follows it at once."""
    stops = tokenizer.stop_token_ids
    for index in range(min(end, len(ids) - 1), start - 1, -1):
        if ids[index] in stops:
            return index
    raise UserError(
        f"chat_template: an assistant message must end with a stop token (id {' or '.join(map(str, stops))}), or the "
        "model never learns to stop; write <|eot_id|> or the EOS token after its content"
    )


def render(
    messages: Sequence[Message], template: str, add_generation_prompt: bool = False, **variables: object
) -> Rendered:
    """The text of a conversation, as transformers' apply_chat_template renders it, and the spans of its answers.

    Args:
        template: jinja. Without {% generation %}, the spans are what an assistant message adds to the text of the
            messages before it and their generation prompt.
        variables: what else the template may use, such as bos_token.

    Raises:
        UserError: the template is wrong, refuses the messages, or (without {% generation %}) does not keep the text of
            earlier messages when later ones follow.
    """
    marked = _render(messages, template, add_generation_prompt, variables)
    if _START in marked:
        return _split_at_marks(marked)
    return Rendered(marked, list(_spans_by_prefix(messages, template, variables, marked)))


def _render(messages: Sequence[Message], template: str, add_prompt: bool, variables: Mapping[str, object]) -> str:
    compiled = _compile(template)
    given = {"tools": None, "documents": None, "messages": messages, "add_generation_prompt": add_prompt, **variables}
    try:
        return compiled.render(_with_strings(given, partial(_MARKS.sub, "")))
    except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"chat_template: {error}") from None


def _split_at_marks(marked: str) -> Rendered:
    text, spans, start = "", [], 0
    for part in _MARKS.split(marked):
        if part == _START:
            start = len(text)
        elif part == _END:
            spans.append((start, len(text)))
        else:
            text += part
    return Rendered(text, spans)


def _spans_by_prefix(
    messages: Sequence[Message], template: str, variables: Mapping[str, object], text: str
) -> Iterator[Span]:
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:index], template, True, variables)
        turn = _render(messages[: index + 1], template, False, variables)
        if not (turn.startswith(prompt) and text.startswith(turn)):
            raise UserError(
                f"chat_template: the text of messages 1 to {index + 1} changes with what follows, so answers cannot be "
                "found in it; put {% generation %} and {% endgeneration %} around them in the template"
            )
        yield len(prompt), len(turn)


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: its output between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_START, _END))
        return [before, *body, after]


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat_template: line {error.lineno}: {error}") from None


@lru_cache(maxsize=16)
def _names_in(template: str) -> set[str]:
    """The variables that a template reads, and its words: a field is written as `.tool_calls` or as ['tool_calls']."""
    _compile(template)
    words = set(re.findall(r"\w+", template)) - {"tools"}
    return words | meta.find_undeclared_variables(_environment().parse(template))


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers documents for chat templates: sandboxed, blocks trimmed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
