"""Text from a model.

    loading     a stored model and its tokenizer
    sampling    one token at a time, with keys and values cached
    session     a conversation: history, the model's turns, what is forgotten when the context is full
    terminal    that conversation at a prompt
    cli         the command: a prompt, a file of prompts, or a chat

A prompt is a list of ids, whether a text or a conversation made it.
"""

from bitnet_train.generate.sampling import Sampling, complete, generate, prompt_ids_of, sample, stream, until
from bitnet_train.generate.session import ChatSession

__all__ = ["ChatSession", "Sampling", "complete", "generate", "prompt_ids_of", "sample", "stream", "until"]
