"""The masters in a checkpoint of a run: checkpoints/step-000100/state.pt, mapped into memory, or the shards beside it.

torch.load reads plain containers only (weights_only) and maps the tensors, so that what is not asked for is not read.
As with safetensors, what was touched stays resident while the file is mapped: it is mapped anew for each tensor.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.parts import row_slices
from bitnet_train.formats.shards import fill, outline
from bitnet_train.model.weights import check_finite
from bitnet_train.quant import TernaryWeight, quantize_weight

STATE = "state.pt"


@dataclass(frozen=True)
class CheckpointWeights:
    """The `Weights` of a checkpoint.

    Raises (every method):
        UserError: the file is damaged, or no checkpoint of this project.
    """

    file: Path

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.file.parent

    def _state(self) -> dict[str, Any]:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.file}: cannot be read: {str(error).splitlines()[0]}; take another one") from None
        if not isinstance(state, dict) or not {"model", "identity"} <= state.keys():
            raise UserError(f"{self.file}: must hold the state of a run (model, identity); give a checkpoint of one")
        return state

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was, among it the model's configuration as JSON."""
        identity: dict[str, Any] = self._state()["identity"]
        return identity

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
        check_finite(self.file, name, tensor)
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
