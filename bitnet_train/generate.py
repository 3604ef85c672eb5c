"""Text from a model: nucleus sampling, one token at a time, with keys and values cached.

python tools/generate.py SRC --prompt TEXT [--chat] [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S]
"""

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError, run_command
from bitnet_train.model.attention import KVCache
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import load_for_inference, source_folder


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from softmax(logits / temperature), cut to the smallest set of ids whose probabilities reach top_p.

    Args:
        logits: float `(vocab,)`.
        temperature: 0 takes the most likely id.
        top_p: in (0, 1]; Holtzman et al., nucleus sampling (arXiv 1904.09751).
    """
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / temperature, dim=-1).sort(descending=True, stable=True)
    inside = probabilities.cumsum(dim=-1) - probabilities < top_p
    choice = torch.multinomial(probabilities * inside, 1, generator=generator)
    return int(ids[choice])


@torch.inference_mode()
def generate(
    model: BitNetForCausalLM,
    prompt_ids: list[int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields new ids until a stop id (which is not yielded), max_new_tokens, or the end of the model's context."""
    generator = generator or torch.Generator().manual_seed(0)
    device, cache = model.head_weight.device, KVCache()
    ids = prompt_ids
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))):
        logits = model(torch.tensor([ids], device=device), cache=cache, logits_to_keep=1)
        token = sample(logits[0, -1].cpu(), temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        ids = [token]


def complete(
    model: BitNetForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The model's continuation of the prompt, or its answer where `chat` sends the prompt as a user's message."""
    if chat:
        prompt_ids = encode_prompt([{"role": "user", "content": prompt}], tokenizer)
    else:
        prompt_ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    if len(prompt_ids) >= model.config.max_position_embeddings:
        raise UserError(
            f"--prompt has {len(prompt_ids)} tokens, the context {model.config.max_position_embeddings}; shorten it"
        )
    generator = torch.Generator().manual_seed(seed)
    new = generate(model, prompt_ids, tokenizer.stop_token_ids, max_new_tokens, temperature, top_p, generator)
    return tokenizer.decode(list(new), skip_special_tokens=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with a run's result, a master folder or a packed one.")
    parser.add_argument("source", metavar="SRC", help="run directory, HF folder (master or packed) or GGUF file")
    parser.add_argument("--prompt", required=True, help="text to continue, or the user's message with --chat")
    parser.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.temperature < 0.0:
        raise UserError(f"--temperature must be at least 0, got {arguments.temperature}")
    if not 0.0 < arguments.top_p <= 1.0:
        raise UserError(f"--top-p must lie in (0, 1], got {arguments.top_p}")


def _main() -> None:
    arguments = _arguments()
    _check(arguments)
    folder: Path = source_folder(arguments.source, "SRC")
    model, tokenizer = load_for_inference(folder), Tokenizer.from_folder(folder)
    text = complete(
        model,
        tokenizer,
        arguments.prompt,
        arguments.chat,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
    )
    print(text)


def main() -> None:
    """Entry point of `bitnet-generate`."""
    run_command(_main)
