"""How fast a run is, between two log events.

    tokens_per_second   positions without padding, over all ranks
    tflops_per_second   of one device: tokens/s (6 N + 12 L H T) / 1e12, with N the values of the matrices that tokens
                        are multiplied by, L layers, H hidden size, T row length (PaLM, arXiv 2204.02311, appendix B)
    mfu                 model FLOPs utilisation: the same over the device's bfloat16 peak, where Lightning knows it
    data_wait           share of the time in which the loop waited for a batch

Time that validation takes does not count.
"""

import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from bitnet_train.model.decoder import BitNetForCausalLM

Metrics = dict[str, float]


def flops_per_token(model: BitNetForCausalLM, row_length: float) -> float:
    """6 N + 12 L H T: forward and backward of one token. Rows of several short documents compute less attention."""
    config = model.config
    values = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
    if not config.tie_word_embeddings:
        values -= model.model.embed_tokens.weight.numel()  # looked up, not multiplied
    return 6.0 * values + 12.0 * config.num_hidden_layers * config.hidden_size * row_length


class Throughput:
    """A clock that the training module starts, pauses and reads."""

    def __init__(self) -> None:
        self._started = self._paused = self._idle_since = time.perf_counter()
        self._waited = 0.0
        self._row_lengths: list[int] = []

    def restart(self) -> None:
        """Everything measured so far is forgotten."""
        self._started = self._idle_since = time.perf_counter()
        self._waited = 0.0
        self._row_lengths = []

    def pause(self) -> None:
        """What follows does not count, until `go_on`."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Ends what `pause` began."""
        now = time.perf_counter()
        self._started += now - self._paused
        self._idle_since = now

    def batch_asked_for(self) -> None:
        """The loop turns to the data."""
        self._idle_since = time.perf_counter()

    def batch_arrived(self, row_length: int) -> None:
        """The loop has a batch of rows of `row_length` positions."""
        self._waited += time.perf_counter() - self._idle_since
        self._row_lengths.append(row_length)

    def read(self, tokens: float, model: BitNetForCausalLM, devices: int) -> Metrics:
        """The rates of `tokens` since the last call or `restart`, under the names of the module's text."""
        seconds = time.perf_counter() - self._started
        length = sum(self._row_lengths) / max(1, len(self._row_lengths))
        flops = tokens / seconds * flops_per_token(model, length) / devices
        peak = get_available_flops(model.head_weight.device, torch.bfloat16)
        metrics = {
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops / 1e12,
            **({"mfu": flops / peak} if peak else {}),
            "data_wait": self._waited / seconds,
        }
        self.restart()
        return metrics
