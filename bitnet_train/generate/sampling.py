"""Nucleus sampling, one token at a time, with keys and values cached."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.model.attention import KVCache
from bitnet_train.model.decoder import BitNetForCausalLM


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn: from softmax(logits / temperature), cut to the smallest set of ids that reach top_p together.

    Attributes:
        temperature: 0 takes the most likely id.
        top_p: in (0, 1]; Holtzman et al., nucleus sampling (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")


GREEDY = Sampling()


def sample(logits: Tensor, how: Sampling, generator: torch.Generator) -> int:
    """One id for logits `(vocab,)`, float."""
    if how.temperature == 0.0:
        return int(logits.argmax())
    below = logits.double() - logits.max()  # the largest is 0, whatever it is divided by
    probabilities, ids = torch.softmax(below / how.temperature, dim=-1).sort(descending=True, stable=True)
    inside = probabilities.cumsum(dim=-1) - probabilities < how.top_p
    choice = torch.multinomial(probabilities * inside, 1, generator=generator)
    return int(ids[choice])


@torch.inference_mode()
def generate(
    model: BitNetForCausalLM,
    prompt_ids: list[int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    how: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields new ids until a stop id (which is not yielded), max_new_tokens, or the end of the model's context."""
    generator = generator or torch.Generator().manual_seed(0)
    device, cache = model.head_weight.device, KVCache()
    ids = prompt_ids
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))):
        logits = model(torch.tensor([ids], device=device), cache=cache, logits_to_keep=1)
        token = sample(logits[0, -1].cpu(), how, generator)
        if token in stop_ids:
            return
        yield token
        ids = [token]


def prompt_ids_of(tokenizer: Tokenizer, prompt: str, chat: bool, system: str | None = None) -> list[int]:
    """Ids of a text to continue, BOS first, or of a user's message (after a system message) through the template."""
    if not chat:
        return tokenizer.begun(tokenizer.encode(prompt)) or [tokenizer.prefix_token_id]
    messages = [Message(role="system", content=system)] if system else []
    return encode_prompt([*messages, Message(role="user", content=prompt)], tokenizer)


def stream(
    model: BitNetForCausalLM,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    max_new_tokens: int,
    how: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The text that `generate` makes, in pieces as they come, until one of the tokenizer's stop tokens.

    Raises:
        UserError: after the prompt the context has no room for a token.
    """
    context = model.config.max_position_embeddings
    if len(prompt_ids) >= context:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens, the context {context}; shorten it")
    new = generate(model, prompt_ids, tokenizer.stop_token_ids, max_new_tokens, how, generator)
    return tokenizer.decode_stream(new)


def until(pieces: Iterable[str], stop: Sequence[str]) -> str:
    """The text of the pieces up to the first of the strings, which is left out; no piece after it is asked for."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [text.index(string) for string in stop if string in text]
        if ends:
            return text[: min(ends)]
    return text


def complete(
    model: BitNetForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    how: Sampling = GREEDY,
    seed: int = 0,
) -> str:
    """The model's continuation of the prompt, or its answer where `chat` sends the prompt as a user's message."""
    prompt_ids, generator = prompt_ids_of(tokenizer, prompt, chat), torch.Generator().manual_seed(seed)
    return "".join(stream(model, tokenizer, prompt_ids, max_new_tokens, how, generator))
