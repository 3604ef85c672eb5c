"""A state in shards: every rank writes its rows, and runs of any number of ranks read them.

    checkpoints/step-000100/state.pt        plain containers; a sharded tensor's place holds "shards:" and its name
    checkpoints/step-000100/.metadata       torch.distributed.checkpoint: which rows of which tensor lie where
    checkpoints/step-000100/__0_0.distcp    rows of rank 0, and so on

A tensor is named by its path in the state, such as optimizer/state/7/exp_avg.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_sharded

from bitnet_train.errors import UserError
from bitnet_train.formats.safe_metadata import METADATA, SafeReader, load_metadata

State = dict[str, Any]

_MARK = "shards:"
_OWN = "ranks"  # the part of a state where every rank keeps tensors of its own


def mapped(value: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """The same nest of dicts and lists with function(path, leaf) in place of every leaf."""
    if isinstance(value, Mapping):
        return {key: mapped(child, function, f"{path}/{key}" if path else str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [mapped(child, function, f"{path}/{number}") for number, child in enumerate(value)]
    return function(path, value)


def split(state: State) -> tuple[State, dict[str, Tensor]]:
    """A state without its sharded tensors, and these by name."""
    tensors: dict[str, Tensor] = {}

    def without(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensors[path] = leaf.detach()
        return _MARK + path

    return mapped(state, without), tensors


def fill(state: State, folder: Path, mesh: DeviceMesh | None = None) -> State:
    """A state as `split` left it, or one that was never split, for a run with this mesh. All its ranks call it.

    Args:
        state: what state.pt in the folder holds.
        folder: the checkpoint.
        mesh: over which every tensor that is no number is cut; None for a run that keeps tensors whole.

    Raises:
        UserError: the folder's metadata are damaged, or lack a tensor.
    """
    marks = [leaf for leaf in _leaves(state) if is_marked(leaf)]
    tensors = _read(folder, marks, mesh) if marks else {}

    def filled(path: str, leaf: Any) -> Any:
        if is_marked(leaf):
            return tensors[leaf]
        if mesh is None or not isinstance(leaf, Tensor) or leaf.ndim == 0 or path.startswith(_OWN):
            return leaf
        return distribute_tensor(leaf.to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)

    filled_state: State = mapped(state, filled)
    return filled_state


def outline(state: State, folder: Path) -> State:
    """A state as `split` left it, with tensors on the meta device, shape and dtype alone, in place of sharded ones."""
    stored = _Stored(folder)

    def outlined(path: str, leaf: Any) -> Any:
        if not is_marked(leaf):
            return leaf
        size, dtype = stored.kind(leaf)
        return torch.empty(size, dtype=dtype, device="meta")

    outlined_state: State = mapped(state, outlined)
    return outlined_state


def is_marked(leaf: Any) -> bool:
    """Whether a leaf of a state stands in the place of a sharded tensor."""
    return isinstance(leaf, str) and leaf.startswith(_MARK)


def _leaves(state: State) -> list[Any]:
    leaves: list[Any] = []
    mapped(state, lambda path, leaf: leaves.append(leaf))
    return leaves


class _Stored:
    """What a folder's metadata say of its tensors, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def entries(self) -> Mapping[str, object]:
        return load_metadata(self.folder).state_dict_metadata

    def kind(self, mark: str) -> tuple[torch.Size, torch.dtype]:
        """Size and dtype of a tensor."""
        name = mark.removeprefix(_MARK)
        entry = self.entries.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.folder / METADATA}: must describe {name}, which state.pt names; take another one")
        return entry.size, entry.properties.dtype


def _read(folder: Path, marks: Sequence[str], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Tensors of the folder, or this rank's rows of them, by their marks."""
    stored = _Stored(folder)
    tensors: dict[str, Tensor] = {}
    for mark in marks:
        size, dtype = stored.kind(mark)
        tensors[mark.removeprefix(_MARK)] = (
            torch.empty(size, dtype=dtype)
            if mesh is None
            else empty_sharded(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        )
    load(tensors, storage_reader=SafeReader(folder), no_dist=mesh is None)
    return {_MARK + name: tensor for name, tensor in tensors.items()}
