"""Conversations to token ids, and which of them an assistant said.

    <|begin_of_text|>User: Hi<|eot_id|>Assistant: Hello<|eot_id|>
    -------------------------------------------================    = trained: the answer and its stop token

The template alone decides about the text, BOS included, and `data.pieces` about the ids: what is trained is what
transformers' apply_chat_template gives, and a prompt is where training ends a prompt. The names of special tokens
inside a message stay text, as with transformers' sanitize_control_tokens=True, which is not its default.

The functions of a row's field "tools", the `tool_calls` of messages and their reasoning reach the template as in
transformers. A row that has them and a template that does not write them is an error.

Source of BitNet's format: the model card of microsoft/bitnet-b1.58-2B-4T and the chat format of microsoft/BitNet.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from bitnet_train.data.conversation import Message, with_parsed_arguments
from bitnet_train.data.preference import Pair
from bitnet_train.data.template import Span, names_in, render, with_strings, writes_strings
from bitnet_train.errors import UserError

if TYPE_CHECKING:
    from bitnet_train.data.tokenizer import Tokenizer

TRAIN_ON = ("assistant", "last", "all")

_NO_STOP = (
    "chat_template: an answer must end with a stop token, or the model never learns to stop; write {} after its content"
)

Tools = Sequence[object] | None  # JSON schemas of functions


class EncodedChat(NamedTuple):
    """Token ids of a conversation, and for each id whether it is trained."""

    input_ids: list[int]
    trained: list[bool]


def encode_chat(
    messages: Sequence[Message], tokenizer: "Tokenizer", train_on: str = "assistant", tools: Tools = None
) -> EncodedChat:
    """A conversation for SFT.

    Args:
        train_on: `assistant`: every answer with its stop token; `last`: the last answer only; `all`: all but BOS. An
            answer whose message says `train: false` is never trained.

    Raises:
        UserError: an unknown train_on, a template that fails, has no place for what the row has or does not close an
            answer with a stop token, or a conversation without anything to train on.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
    texts = chat_pieces(messages, tokenizer, tools)
    ids, spans = _joined(tokenizer.encode_pieces(texts))
    if not spans:
        raise UserError("the conversation has no assistant message to train on; drop the row")
    answers = _answers(messages, len(spans))
    wanted = [answer.get("train", True) for answer in answers]
    if train_on == "last":
        wanted = [False] * (len(spans) - 1) + wanted[-1:]
    if not any(wanted):
        raise UserError("no answer of the conversation is to be trained (weight 0, train or loss false); drop the row")
    trained = [train_on == "all" and index > 0 for index in range(len(ids))]
    for (start, end), answer, text, is_wanted in zip(spans, answers, texts[1::2], wanted, strict=True):
        if not is_wanted and train_on != "all":
            continue
        _check_found(text, tokenizer)
        if is_wanted:
            _check_whole(answer, text, tokenizer)
        stop = _stop_index(ids, start, end, tokenizer)
        trained[start : stop + 1] = [is_wanted] * (stop + 1 - start)
    return EncodedChat(ids, trained)


def encode_prompt(messages: Sequence[Message], tokenizer: "Tokenizer", tools: Tools = None) -> list[int]:
    """A conversation that the assistant is to continue: the template's text and its generation prompt.

    Followed by an answer and its stop token, these are the ids of `encode_chat`.
    """
    pieces = chat_pieces(messages, tokenizer, tools, add_generation_prompt=True)
    return _joined(tokenizer.encode_pieces(pieces))[0]


def encode_answer(messages: Sequence[Message], answer: str, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Ids of a prompt, as `encode_prompt`, and of a text that an assistant may continue it with; no stop token."""
    prompt = chat_pieces(messages, tokenizer, add_generation_prompt=True)
    *before, after = tokenizer.encode_pieces([*prompt, tokenizer.quote(answer)])
    return _joined(before)[0], after


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

    Names of special tokens in the messages are quoted, for `Tokenizer.encode_pieces`.
    """
    template = tokenizer.template_for(tools)
    _check_place(messages, tools, template, tokenizer.chat_templates)
    variables = tokenizer.template_variables
    as_strings = any(message.get("tool_calls") for message in messages) and writes_strings(template, **variables)
    given = [_for_template(message, as_strings) for message in messages]
    quoted, tools = with_strings(given, tokenizer.quote), with_strings(tools, tokenizer.quote)
    text, spans = render(quoted, template, add_generation_prompt, tokenizer.stop_tokens, tools=tools, **variables)
    ends = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _joined(pieces: Sequence[list[int]]) -> tuple[list[int], list[Span]]:
    """The ids of all pieces, and where every second one begins and ends."""
    edges = [0, *accumulate(map(len, pieces))]
    return [id for piece in pieces for id in piece], list(pairwise(edges))[1::2]


def _for_template(message: Message, as_strings: bool) -> dict[str, object]:
    """A message as transformers' users write it; arguments that are JSON may stay strings."""
    given: dict[str, object] = {key: value for key, value in message.items() if key != "train"}
    if calls := message.get("tool_calls"):
        given["tool_calls"] = calls if as_strings else with_parsed_arguments(calls)
    return given


def _check_place(messages: Sequence[Message], tools: Tools, template: str, others: Mapping[str, str]) -> None:
    """transformers would leave out without a word what the template does not write."""
    has = {
        "tools": (bool(tools), {"tools"}),
        "tool_calls": (any(message.get("tool_calls") for message in messages), {"tool_calls"}),
        "reasoning_content": (any(map(_reasoning_of, messages)), {"reasoning_content", "thinking"}),
    }
    for name, (given, written) in has.items():
        if given and not written & names_in(template):
            remedy = "give one that does"
            if not tools and written & names_in(others.get("tool_use", "")):
                remedy = "give the row tools: the template tool_use, which is taken for rows with tools, does"
            raise UserError(f"chat_template: the row has {name}, which the template does not write; {remedy}")


def _reasoning_of(message: Mapping[str, object]) -> str:
    return str(message.get("reasoning_content", "")).strip()


def _answers(messages: Sequence[Message], spans: int) -> list[Message]:
    """The message of each span."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != spans:
        raise UserError(
            f"chat_template: writes {spans} answers for {len(answers)} messages of the assistant; put one "
            "{% generation %} block around each"
        )
    return answers


def _check_found(text: str, tokenizer: "Tokenizer") -> None:
    """Refuses a row with an answer whose place in the text is unknown."""
    if not text and not any(name in tokenizer.chat_template for name in (*tokenizer.stop_tokens, "eos_token")):
        raise UserError(_NO_STOP.format(" or ".join(tokenizer.stop_tokens)))
    if not text:
        raise UserError(
            "chat_template: an answer cannot be found in the text: what stands before it changes with "
            "what follows, or its turn has no stop token; put {% generation %} and {% endgeneration %} around all "
            "that an assistant writes, or use data.train_on=last"
        )


def _check_whole(answer: Message, text: str, tokenizer: "Tokenizer") -> None:
    """An answer that is trained must stand in the text as the row has it.

    Without its reasoning it would teach not to think; beside tool calls some templates write no content.
    """
    thought, closed, _ = answer["content"].partition("</think>")
    for reasoning in (_reasoning_of(answer), thought.split("<think>")[-1].strip() if closed else ""):
        if tokenizer.quote(reasoning) not in text:
            raise UserError(
                "chat_template: leaves out the reasoning of an answer that is trained (many write that of the last "
                "answer alone); use data.train_on=last, or drop the row"
            )
    if answer.get("tool_calls") and tokenizer.quote(answer["content"].strip()) not in text:
        raise UserError(
            "chat_template: leaves out the content of an answer that has tool_calls, too; give one that writes both, "
            "or drop the row"
        )


def _stop_index(ids: Sequence[int], start: int, end: int, tokenizer: "Tokenizer") -> int:
    """Where an answer stops: its stop token is the last one within the span, or follows it at once."""
    stops = tokenizer.stop_token_ids
    for index in range(min(end, len(ids) - 1), start - 1, -1):
        if ids[index] in stops:
            return index
    raise UserError(_NO_STOP.format(" or ".join(tokenizer.stop_tokens)))
