"""Decoders whose values come from elsewhere: built without drawing random numbers, or without memory at all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM


class uninitialized(TorchFunctionMode):  # noqa: N801  # a context manager
    """Within it the functions of torch.nn.init leave their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(config: BitNetConfig) -> BitNetForCausalLM:
    """The decoder on the meta device: names and shapes, no memory."""
    with torch.device("meta"), uninitialized():
        return BitNetForCausalLM(config)


def tensor_shapes(model: BitNetForCausalLM) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a decoder."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
