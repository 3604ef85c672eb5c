"""Whether other programs make of texts and conversations the ids that training made, and stop where it stops.

    ours           the tokenizer that was trained with
    transformers   AutoTokenizer of the exported folder, with its apply_chat_template
    GGUF           the runtime's own tokenizer; conversations by the file's template, rendered here as llama-server
                   does: a BOS that it wrote is taken away, and the runtime adds its own where the file says so
    the keys       what `GGUFTokenizer` makes of the keys of a GGUF file that is going to be written

Every text of `awkward` is read twice: names of special tokens in it as text, and as tokens. An earlier answer of a
conversation was cut from its prompt in training; a program that sees the whole text may join the two ("Assistant: " and
"Hello" share a space). Such conversations are counted and not compared.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bitnet_train.data.chat import chat_pieces
from bitnet_train.data.conversation import Message
from bitnet_train.data.template import render
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export import llama_process
from bitnet_train.export.awkward import awkward_texts, conversations
from bitnet_train.export.llama_process import RuntimeFailure, Text
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer

Ids = Sequence[Sequence[int]]


class Questions(NamedTuple):
    """The questions to a runtime.

    Attributes:
        prompts: conversations that end with a user's message.
        texts: see `awkward`.
        ids: that may end a generation.
    """

    prompts: Sequence[list[Message]]
    texts: Sequence[str]
    ids: Sequence[int]


class Answers(NamedTuple):
    """Its answers.

    Attributes:
        prompts: the ids of each conversation, or why it has none.
        as_text, as_tokens: the ids of each text, names of special tokens read as either; as text None where the runtime
            cannot, as the names are words of the vocabulary, too.
        stops: which of the ids end a generation.
    """

    prompts: Ids | str
    as_text: Ids | None
    as_tokens: Ids
    stops: Sequence[int]


@dataclass(frozen=True)
class Compared:
    """How many prompts or texts have the same ids in a runtime.

    Attributes:
        what: "prompts" or "texts".
        compared, equal: how many.
        first: the first one that differs, with both ids.
        note: what else is to know.
    """

    what: str
    compared: int
    equal: int
    first: str = ""
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Nothing differs."""
        return self.equal == self.compared

    def __str__(self) -> str:
        counts = f"{self.what} {self.equal} of {self.compared} equal"
        return counts + (f" ({self.note})" if self.note else "") + (f", first {self.first}" if self.first else "")


@dataclass(frozen=True)
class Stops:
    """Where generation ends: `missing` in the runtime alone, and ids that end it there `alone`."""

    missing: tuple[int, ...] = ()
    alone: tuple[int, ...] = ()

    @property
    def agrees(self) -> bool:
        """The runtime stops wherever our generation does."""
        return not self.missing

    def __str__(self) -> str:
        told = f"does not stop at {_listed(self.missing)}" if self.missing else "stop ids equal"
        return told + (f", and it stops at {_listed(self.alone)}" if self.alone else "")


@dataclass(frozen=True)
class TokenizerCheck:
    """A runtime's tokenizer beside ours; `reason` says why prompts were not compared."""

    prompts: Compared | None
    texts: Compared
    stops: Stops
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Nothing differs."""
        return all(self.agreements())

    def agreements(self) -> list[bool]:
        """Of prompts, texts and stop ids, in the order of `lines`."""
        return [part is None or part.agrees for part in (self.prompts, self.texts, self.stops)]

    def lines(self) -> list[str]:
        """The three results, a line each."""
        prompts = f"prompts not compared: {self.reason}" if self.prompts is None else str(self.prompts)
        return [prompts, str(self.texts), str(self.stops)]


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def check_tokenizer(tokenizer: Tokenizer, ask: Callable[[Questions], Answers]) -> TokenizerCheck:
    """Compares a runtime's ids and stops with those of the tokenizer that was trained with."""
    prompts, expected, cut = [], [], 0
    for messages in conversations():
        try:
            pieces = chat_pieces(messages, tokenizer, add_generation_prompt=True)
        except UserError:  # templates may refuse system messages
            continue
        ids = [id for piece in tokenizer.encode_pieces(pieces) for id in piece]
        if tokenizer.encode_pieces(["".join(pieces)]) == [ids]:
            prompts.append(messages)
            expected.append(ids)
        else:
            cut += 1
    texts = awkward_texts(tokenizer.special_tokens)
    answers = ask(Questions(prompts, texts, sorted({*tokenizer.special_token_ids, *tokenizer.stop_token_ids})))
    note = f"{cut} with earlier answers are cut in training alone" if cut else ""
    names = [repr(messages[-1]["content"]) for messages in prompts]
    compared, reason = None, ""
    if isinstance(answers.prompts, str):
        reason = answers.prompts
    else:
        compared = _compared("prompts", names, expected, answers.prompts, note)
    return TokenizerCheck(compared, _compared_texts(tokenizer, texts, answers), _stops(tokenizer, answers), reason)


def _compared(what: str, names: Sequence[str], ours: Ids, theirs: Ids, note: str = "") -> Compared:
    differing = [
        f"{name}: {[*found]}, ours {[*expected]}"
        for name, expected, found in zip(names, ours, theirs, strict=True)
        if [*expected] != [*found]
    ]
    return Compared(what, len(names), len(names) - len(differing), "".join(differing[:1]), note)


def _compared_texts(tokenizer: Tokenizer, texts: Sequence[str], answers: Answers) -> Compared:
    """A text is equal where both of its readings are."""
    as_tokens = [tokenizer.encode_pieces([text])[0] for text in texts]
    readings = [(as_tokens, answers.as_tokens)]
    if answers.as_text is not None:
        readings.append((tokenizer.encode_batch(texts), answers.as_text))
    names = [repr(text) for text in texts]
    equal = [all([*ours[i]] == [*theirs[i]] for ours, theirs in readings) for i in range(len(texts))]
    first = next((found.first for ours, theirs in readings if (found := _compared("", names, ours, theirs)).first), "")
    return Compared("texts", len(texts), sum(equal), first)


def _stops(tokenizer: Tokenizer, answers: Answers) -> Stops:
    ours, theirs = {*tokenizer.stop_token_ids}, {*answers.stops}
    return Stops(tuple(sorted(ours - theirs)), tuple(sorted(theirs - ours)))


def check_folder(tokenizer: Tokenizer, folder: Path) -> TokenizerCheck:
    """transformers' tokenizer of an exported folder.

    Raises:
        RuntimeFailure: transformers cannot read the tokenizer.
    """
    transformers = importlib.import_module("transformers")

    def ask(asked: Questions) -> Answers:
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            given = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
            plain = {"add_special_tokens": False, "return_attention_mask": False}
            as_tokens = [theirs(text, **plain)["input_ids"] for text in asked.texts]
            as_text: Ids | None = None
            if not tokenizer.has_words_for_names:
                as_text = [theirs(text, split_special_tokens=True, **plain)["input_ids"] for text in asked.texts]
        except Exception as error:  # anything, of several libraries
            raise RuntimeFailure(f"{type(error).__name__}: {error}") from None
        how = {"add_generation_prompt": True, "return_dict": True}
        prompts: Ids | str
        try:
            prompts = [theirs.apply_chat_template(prompt, **how)["input_ids"] for prompt in asked.prompts]
        except Exception as error:  # a template is foreign code there, too
            prompts = " ".join(f"{type(error).__name__}: {error}".split())
        stops = given if isinstance(given, list) else [given]
        return Answers(prompts, as_text, as_tokens, [id for id in stops if id is not None])

    return check_tokenizer(tokenizer, ask)


def check_gguf(tokenizer: Tokenizer, file: Path, package: str) -> TokenizerCheck:
    """The tokenizer of llama.cpp or ik_llama.cpp, of an exported file.

    Raises:
        RuntimeFailure: the runtime cannot load the file.
    """
    stored = GGUFTokenizer(file, GGUFFile(file).metadata)
    config = stored.tokenizer_config

    def ask(asked: Questions) -> Answers:
        names = {role: name for role, name in config.items() if role.endswith("_token") and name is not None}
        reason, prompts = "", []
        try:
            prompts = [render(prompt, config["chat_template"], True, **names).text for prompt in asked.prompts]
        except KeyError:
            reason = "the file has no chat template"
        except UserError as error:
            reason = str(error)
        if stored.begins_with_bos:
            prompts = [text.removeprefix(names["bos_token"]) for text in prompts]
        texts = [
            *(Text(text, special=True, add_bos=True) for text in prompts),
            *(Text(text, special=False) for text in asked.texts),
            *(Text(text, special=True) for text in asked.texts),
        ]
        answer = llama_process.ask(package, file, asked.ids[:1], texts, asked.ids)
        first, second = len(prompts), len(prompts) + len(asked.texts)
        return Answers(reason or answer.ids[:first], answer.ids[first:second], answer.ids[second:], answer.stops)

    return check_tokenizer(tokenizer, ask)


def prove_keys(tokenizer: Tokenizer, keys: GGUFTokenizer, path: Path) -> None:
    """Refuses the keys of a GGUF file that say another tokenizer than the one that was trained with.

    Args:
        tokenizer: ours.
        keys: as they are going to be written, read as a runtime reads them.
        path: what the tokenizer was read from, for the message.

    Raises:
        UserError: a text of `awkward` has other ids.
    """
    found = Tokenizer.from_gguf(keys)
    for role in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, role), getattr(found, role)
        if ours != theirs:
            raise UserError(f"{path}: {role} must be {ours}, as trained, got {theirs}; use --format safetensors")
    texts = awkward_texts(tokenizer.special_tokens)
    as_tokens = [found.encode_pieces([text])[0] for text in texts]
    compared = _compared_texts(tokenizer, texts, Answers("", found.encode_batch(texts), as_tokens, ()))
    if not compared.agrees:
        raise UserError(
            f"{path}: the tokenizer must be one that the keys of GGUF can say, got other ids for "
            f"{compared.compared - compared.equal} of {compared.compared} texts, first {compared.first}; use --format "
            "safetensors"
        )
