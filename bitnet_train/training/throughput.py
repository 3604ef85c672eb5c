"""How fast a run is, between two log events.

    tokens_per_second   positions without padding, over all ranks
    tflops_per_second   of one device: tokens/s (6 N + 12 L H T) / 1e12, with N the values of the matrices that tokens
                        are multiplied by, L layers, H hidden size, T row length (PaLM, arXiv 2204.02311, appendix B)
    mfu                 model FLOPs utilisation: the same over the device's bfloat16 peak, where PEAKS has it
    peak_memory_gb      of a GPU, the most that this process has had at once, in 10^9 bytes
    data_wait           share of the time in which the loop waited for a batch

Time that validation takes does not count.
"""

import time

import torch

from bitnet_train.model.decoder import BitNetForCausalLM

Metrics = dict[str, float]

# TFLOP/s of dense bfloat16 products with float32 sums, by a part of the device's name; the first that fits counts.
# Nvidia's data sheets give most of them with sparsity, that is twice as high. Those of the RTX are in the white papers
# of Ada and Blackwell.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Most bfloat16 operations per second of a device, where they are known: not of a part of one or a laptop's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "Laptop" in name or "MIG" in name:
        return None
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


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
        device = model.head_weight.device
        peak = peak_flops(device)
        metrics = {
            "tokens_per_second": tokens / seconds,
            "tflops_per_second": flops / 1e12,
            **({"mfu": flops / peak} if peak else {}),
            **({"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}),
            "data_wait": self._waited / seconds,
        }
        self.restart()
        return metrics
