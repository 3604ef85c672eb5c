"""The masters in a checkpoint of a run: checkpoints/step-000100/state.pt, mapped into memory, or the shards beside it.

torch.load reads plain containers only (weights_only) and maps the tensors, so that what is not asked for is not read.
As with safetensors, what was touched stays resident while the file is mapped: it is mapped anew for each tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_train.formats.json_file import parsed_json
from bitnet_train.formats.parts import row_slices
from bitnet_train.formats.shards import State, fill, outline
from bitnet_train.formats.state_file import STATE, ModelState, read_state
from bitnet_train.model.weights import check_finite
from bitnet_train.quant import TernaryWeight, quantize_weight


@dataclass(frozen=True)
class CheckpointWeights:
    """The `Weights` of a checkpoint.

    Args:
        path: its folder.

    Raises (every method):
        UserError: the file is damaged, or no checkpoint of this project.
    """

    path: Path

    def _state(self) -> State:
        return read_state(self.path, ModelState)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, which the state has as JSON."""
        return parsed_json(self._state()["identity"]["model"], f"{self.path / STATE}: identity.model")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._outline.items()}

    @cached_property
    def _outline(self) -> dict[str, Tensor]:
        """The tensors' shapes and dtypes."""
        model = outline(self._state()["model"], self.path)
        return {name: tensor.to("meta") for name, tensor in model.items()}

    @cached_property
    def _whole(self) -> Callable[[str], Tensor]:
        """A tensor by its name, and the last one again without loading it anew: rows are asked for by parts."""
        return lru_cache(maxsize=1)(lambda name: fill({name: self._state()["model"][name]}, self.path)[name])

    def _read(self, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = self._whole(name)[rows]
        check_finite(self.path / STATE, name, tensor)
        return tensor

    def ternary(self, name: str) -> TernaryWeight:
        """Codes and scale of a master, quantised now."""
        return quantize_weight(self._read(name))

    def parts(self, name: str) -> list[Callable[[], Tensor]]:
        """Calls that read a tensor by blocks of rows."""
        return [partial(self._read, name, rows) for rows in row_slices(self.shapes[name])]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return self._outline[name].dtype
