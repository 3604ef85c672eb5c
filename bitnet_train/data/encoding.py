"""Rows to sequences of tokens, one encoder per kind of data: what a token cache is built with.

    text          BOS if there is one, document, EOS       every token trained; a long document comes in parts
    chat          the conversation, rendered and encoded   what the assistant says is trained
    preference    prompt + chosen, then prompt + rejected  the completions are trained

A row that is wrong gives its error, in its place among the results.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from bitnet_train.data.chat import encode_chat, encode_pair
from bitnet_train.data.conversation import messages_of, text_of, tools_of, unread, unread_of_conversation
from bitnet_train.data.parts import Cut
from bitnet_train.data.preference import pair_of, unread_of_pair
from bitnet_train.data.sources import Row, located
from bitnet_train.data.store import sequence
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError

Encoded: TypeAlias = list[np.ndarray] | UserError  # the sequences of one row


@dataclass(frozen=True)
class Encoder(ABC):
    """Encodes rows of one kind.

    `repr` names, beside the tokenizer's fingerprint, everything that decides about the ids.
    """

    tokenizer: Tokenizer = field(repr=False)

    @property
    def cut(self) -> Cut | None:
        """Where a reader may cut a long text; None: a row must be whole."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """The sequences of every row, uint32 as `store.sequence` makes them, or what is wrong with the row.

        Where a row is a part of one, its sequence is a part of one, too.
        """

    @abstractmethod
    def unread(self, row: Row) -> Iterable[str]:
        """The names of the fields of a row, encoded before without an error, that nothing was made of."""


@dataclass(frozen=True)
class TextEncoder(Encoder):
    """Documents, or parts of them; one without text gives no sequence."""

    @property
    def cut(self) -> Cut:
        """See `Encoder.cut`."""
        return self.tokenizer.cut

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """See `Encoder.encode`."""
        try:
            return self._together(rows)
        except UserError:  # the tokenizer fails on one of them: which?
            return [self._alone(row) for row in rows]

    def _together(self, rows: Sequence[Row]) -> list[Encoded]:
        texts = [self._text(row) for row in rows]
        begun, continued = (
            iter(self.tokenizer.encode_batch(self._those_of(rows, texts, begins), continued=not begins))
            for begins in (True, False)
        )
        return [
            self._sequence(row, next(begun if row.begins else continued)) if isinstance(text, str) else text
            for row, text in zip(rows, texts, strict=True)
        ]

    def _alone(self, row: Row) -> Encoded:
        try:
            with located(row):
                return self._together([row])[0]
        except UserError as error:
            return error

    def unread(self, row: Row) -> Iterable[str]:
        """See `Encoder.unread`."""
        return unread(row.fields, {"text"})

    @staticmethod
    def _text(row: Row) -> str | UserError:
        try:
            return text_of(row)
        except UserError as error:
            return error

    @staticmethod
    def _those_of(rows: Sequence[Row], texts: Sequence[str | UserError], begins: bool) -> list[str]:
        pairs = zip(rows, texts, strict=True)
        return [text for row, text in pairs if row.begins == begins and isinstance(text, str)]

    def _sequence(self, row: Row, ids: list[int]) -> list[np.ndarray]:
        if row.begins and row.ends and not ids:
            return []
        begun = self.tokenizer.begun(ids) if row.begins else ids
        return [sequence([*begun, self.tokenizer.eos_token_id] if row.ends else begun, True)]


class _RowByRow(Encoder):
    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """See `Encoder.encode`."""
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Encoded:
        try:
            return self.sequences(row)
        except UserError as error:
            return error

    @abstractmethod
    def sequences(self, row: Row) -> list[np.ndarray]:
        """The sequences of a row. Raises UserError that names it."""


@dataclass(frozen=True)
class ChatEncoder(_RowByRow):
    """Conversations; `train_on` as in `encode_chat`."""

    train_on: str = "assistant"

    def sequences(self, row: Row) -> list[np.ndarray]:
        """One sequence."""
        messages, tools = messages_of(row), tools_of(row)
        with located(row):
            ids, trained = encode_chat(messages, self.tokenizer, self.train_on, tools)
        return [sequence(ids, trained)]

    def unread(self, row: Row) -> Iterable[str]:
        """See `Encoder.unread`."""
        return unread_of_conversation(row.fields)


@dataclass(frozen=True)
class PairEncoder(_RowByRow):
    """Preference pairs."""

    def sequences(self, row: Row) -> list[np.ndarray]:
        """Two sequences: prompt and chosen, prompt and rejected."""
        pair, tools = pair_of(row), tools_of(row)
        with located(row):
            prompt, *completions = encode_pair(pair, self.tokenizer, tools)
        return [_completed(prompt, completion) for completion in completions]

    def unread(self, row: Row) -> Iterable[str]:
        """See `Encoder.unread`."""
        return unread_of_pair(row.fields)


def _completed(prompt: list[int], completion: list[int]) -> np.ndarray:
    return sequence(prompt + completion, [False] * len(prompt) + [True] * len(completion))
