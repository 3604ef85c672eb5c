"""Decoders that are not built as they stand: without random numbers, without memory, or with some of their rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM


class _Calls(TorchFunctionMode, ABC):
    """Within it `call` does what torch is asked to do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(func, getattr(func, "__module__", None) == torch.nn.init.__name__, args, dict(kwargs or {}))

    @abstractmethod
    def call(self, func: Callable[..., Any], init: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Calls the function or does otherwise; `init`: it is one of torch.nn.init's."""


class uninitialized(_Calls):  # noqa: N801  # a context manager
    """Within it the functions of torch.nn.init leave their tensor as it is."""

    def call(self, func: Callable[..., Any], init: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if init:
            return args[0] if args else options["tensor"]
        return func(*args, **options)


class own_rows(_Calls):  # noqa: N801  # a context manager
    """Within it only some rows of a matrix get values; the others take no memory, as nobody writes to it.

    The functions of torch.nn.init draw a matrix whole, all of them into the same memory, so that the values are those
    of a decoder that is built as it stands. Of what is copied into a parameter, the rows are taken.

    Args:
        rows: of a matrix with so many rows, those that get values.
    """

    def __init__(self, rows: Callable[[int], range]) -> None:
        super().__init__()
        self.rows = rows
        self._drawn = torch.empty(0)

    def call(self, func: Callable[..., Any], init: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        target = args[0] if args else options.get("tensor")
        if not isinstance(target, nn.Parameter) or target.ndim < 2 or not (init or func is Tensor.copy_):
            return func(*args, **options)
        options.pop("tensor", None)
        whole = func(self._memory_for(target), *args[1:], **options) if init else args[1]
        rows = self.rows(len(target))
        target.data[rows.start : rows.stop] = whole[rows.start : rows.stop]
        return target

    def _memory_for(self, target: Tensor) -> Tensor:
        if len(self._drawn) < target.numel():
            self._drawn = torch.empty(target.numel())
        return self._drawn[: target.numel()].view(target.shape)


def skeleton(config: BitNetConfig) -> BitNetForCausalLM:
    """The decoder on the meta device: names and shapes, no memory."""
    with torch.device("meta"), uninitialized():
        return BitNetForCausalLM(config)


def ternary_names(model: BitNetForCausalLM) -> dict[str, None]:
    """The weights that are ternary, one of each BitLinear, as an ordered set."""
    modules = model.named_modules()
    return dict.fromkeys(f"{name}.weight" for name, module in modules if isinstance(module, BitLinear))


def tensor_shapes(model: BitNetForCausalLM) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a decoder."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
