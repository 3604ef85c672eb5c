"""A conversation: what was said goes into every prompt, and the oldest turns leave it when the context is full.

    [system] user assistant user assistant ... user -> assistant
             --------------                                        dropped first, as a pair

The system message stays, and so does the message that is to be answered.
"""

from collections.abc import Callable, Generator, Iterator

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.conversation import Message, check_text
from bitnet_train.data.tokenizer import Tokenizer


class ChatSession:
    """A user and a model in turns.

    Args:
        tokenizer: has the chat template.
        answer: gives the text of an answer in pieces, for the ids of a conversation; raises UserError if they are too
            many.
        capacity: tokens that a conversation may have so that the context has room for an answer.
        system: what the conversation begins with, if anything.

    Attributes:
        turns: the messages so far, user and assistant in turn; the system message is none of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, answer: Callable[[list[int]], Iterator[str]], capacity: int, system: str | None
    ) -> None:
        self._tokenizer, self._answer, self._capacity = tokenizer, answer, capacity
        self._system = [Message(role="system", content=system)] if system else []
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.turns = []

    def say(self, text: str) -> Generator[str]:
        """The model's answer in pieces. Both messages are remembered when it ends, also when it is not read to its end.

        Raises:
            UserError: the text is empty or no text, or longer than the context; it is not remembered.
        """
        turns = [*self.turns, Message(role="user", content=check_text(text, "the message"))]
        ids = self._ids(turns)
        while len(ids) > self._capacity and len(turns) > 1:
            turns = turns[2:]
            ids = self._ids(turns)
        return self._remembered(turns, self._answer(ids))

    def _ids(self, turns: list[Message]) -> list[int]:
        return encode_prompt([*self._system, *turns], self._tokenizer)

    def _remembered(self, turns: list[Message], pieces: Iterator[str]) -> Generator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.turns = [*turns, Message(role="assistant", content=said)]
