"""Encodes the text that a chat template wrote: names of special tokens are tokens, but for those in a message.

    pieces     the text, cut where an assistant's answers begin and end: a prompt ends where an answer begins, and a
               model that generates sees no further. "Assistant: " and "Hello" would share the space before the word
    parts      the pieces, cut around names of special tokens that messages hold ("quoted"), as transformers cuts them
               with sanitize_control_tokens=True: nobody ends a turn by typing <|eot_id|>

Where no word that the tokenizer splits a text into reaches from one piece into the next (templates end a prompt with a
line break or a special token), the ids are those of the whole text, as transformers has them. So a part is encoded as
what it is in the text: a beginning, what follows a special token, or a continuation, in front of which SentencePiece's
tokenizers must put no space.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from bitnet_train.data.template import MARKS, QUOTE_END, QUOTE_START
from bitnet_train.formats.tokenizer_faults import tokenizer_faults

_STEPS = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")  # what is done to a text before its tokens


class PieceEncoder:
    """Encodes pieces of text.

    Args:
        backend: adds nothing to a text.
        special_ids: the special tokens, by name.
        unknown_id: stands for what is no token; no text that becomes it becomes a control token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: Mapping[str, int], unknown_id: int | None) -> None:
        self._backend, self._control_ids = backend, frozenset(special_ids.values()) - {unknown_id}
        self.special_names = _any_of(special_ids)
        name = self.special_names.pattern  # one mark is enough: a template may have cut the other away
        self._quoted = re.compile(f"{QUOTE_START}({name}){QUOTE_END}?|({name}){QUOTE_END}")
        added = backend.get_added_tokens_decoder().values()
        self._added_names = _any_of(token.content for token in added)
        self._eats_spaces = any(token.rstrip for token in added)

    def quote(self, text: str) -> str:
        """The text with marks around every name of a special token, so that `encode` reads it as text."""
        return self.special_names.sub(_quoted, MARKS.sub("", text))

    def encode(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of each of consecutive pieces of a text; see the module's text."""
        encoded: list[list[int]] = []
        before = ""  # the part before, with the name of an added token at its end if it ends with one
        for piece in pieces:
            ids: list[int] = []
            for text, quoted in self._parts(piece):
                if text:
                    ids += self._quoted_name(text) if quoted else self._text(text, before)
                    before = " " if quoted else text  # a quoted name is no token
            encoded.append(ids)
        return encoded

    def _parts(self, piece: str) -> Iterator[tuple[str, bool]]:
        """Texts, and between them names that are quoted."""
        position = 0
        for match in self._quoted.finditer(piece):
            yield from ((text, False) for text in MARKS.split(piece[position : match.start()]))
            yield match[1] or match[2], True
            position = match.end()
        yield from ((text, False) for text in MARKS.split(piece[position:]))  # what a torn mark parts stays apart

    def _text(self, text: str, before: str) -> list[int]:
        """Ids of a text that follows another."""
        if not before or (self._without_prefix is None and not self._eats_spaces):
            return self._ids(text)
        if name := self._name_at_the_end(before):
            first, *ids = self._ids(name + text)
            if first == self._backend.token_to_id(name):  # else both are one longer name
                return ids
        if self._without_prefix is None:
            return self._ids(text)
        found = self._added_names.search(text)
        end = found.start() if found else len(text)  # behind an added token a text begins anew
        return _encoded(self._without_prefix, text[:end]) + self._ids(text[end:])

    def _quoted_name(self, name: str) -> list[int]:
        """Ids of a name that is text, within a text."""
        backend = self._backend if self._without_prefix is None else self._without_prefix
        ids = _encoded(backend, name)
        if self._control_ids.isdisjoint(ids):
            return ids
        return [id for letter in name for id in _encoded(backend, letter)]  # the vocabulary has the name as a word, too

    def _ids(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens are tokens."""
        self._backend.encode_special_tokens = False
        try:
            return _encoded(self._backend, text)
        finally:
            self._backend.encode_special_tokens = True

    @cached_property
    def has_words_for_names(self) -> bool:
        """Whether plain text can become a control token: in Unigram's vocabularies its name is a word, too."""
        names = self._backend.get_added_tokens_decoder()
        texts = [names[id].content for id in sorted(self._control_ids)]
        return any(not self._control_ids.isdisjoint(ids) for ids in encoded(self._backend, texts))

    def _name_at_the_end(self, text: str) -> str | None:
        return next((match[0] for match in self._added_names.finditer(text) if match.end() == len(text)), None)

    @cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer | None:
        """The tokenizer that puts no space in front of a text; None where this one puts none."""
        steps = [json.loads(state_of(step)) for step in (self._backend.normalizer, self._backend.pre_tokenizer)]
        if _prefix_free(steps) == steps:  # known without the vocabulary, which takes half a second to write
            return None
        changed = _prefix_free(json.loads(self._backend.to_str()))
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
        backend.encode_special_tokens = True
        return backend


def _quoted(name: re.Match[str]) -> str:
    return f"{QUOTE_START}{name[0]}{QUOTE_END}"


def state_of(step: Any) -> str:
    """A step of a tokenizer, such as its decoder, as tokenizer.json has it; "null" for None."""
    return "null" if step is None else bytes(step.__getstate__()).decode()


def encoded(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, spread over the cores.

    Raises:
        UserError: the tokenizer fails on one of them: a regex that tries too much, a word that it has no token for.
    """
    with tokenizer_faults(lambda error: f"tokenizer.json: fails on the text ({error}); give a tokenizer that takes it"):
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _encoded(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return encoded(backend, [text])[0]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest of several."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _prefix_free(node: Any) -> Any:
    """A part of tokenizer.json without what puts a space in front of a text."""
    if isinstance(node, list):
        return [_prefix_free(part) for part in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _prefix_free(part) if key in _STEPS else part for key, part in node.items()}
    if node.get("type") == "Metaspace":
        return changed | {"prepend_scheme": "never"}
    if node.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    return changed | ({"add_prefix_space": False} if node.get("type") == "ByteLevel" else {})
