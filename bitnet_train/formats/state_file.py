"""state.pt, the state of a run, for the trainer that goes on from it and for the exporter.

torch.load reads plain containers alone (`weights_only`), maps the tensors, and says nothing of what they are: here the
containers are compared with a schema, once. A place that `shards` has marked holds a string and is looked up there.
"""

import pickle
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import check
from bitnet_train.formats.shards import State, is_marked

STATE = "state.pt"
_REMEDY = "take another checkpoint"

Count = Annotated[int, Meta(ge=0)]


class ModelIdentity(TypedDict):
    """The part of the run's identity that an export reads: the model's config.json."""

    model: str


class ModelState(TypedDict):
    """The fields that an export reads."""

    identity: ModelIdentity
    model: dict[str, Any]


class Generators(TypedDict):
    """The random generators of a rank, as `training.state.rng_state` has them."""

    torch: Tensor
    cuda: Tensor | None
    numpy: tuple[str, Tensor, int, int, float]
    python: tuple[int, list[int], float | None]


class RankState(TypedDict):
    """The fields that every rank has for itself."""

    rng: Generators
    since_log: dict[str, Tensor]


class RunState(TypedDict):
    """The fields that a run reads to go on; see `training.state`."""

    identity: dict[str, Any]
    step: Count
    tokens: Count
    skipped: tuple[Count, Count]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    health: dict[str, Any]
    ranks: Annotated[list[RankState], Meta(min_length=1)]


def read_state(folder: Path, schema: Any) -> State:
    """The state in a checkpoint's folder, on the CPU.

    Args:
        schema: what is read of it: `ModelState` or `RunState`; what else there is stays.

    Raises:
        UserError: the file is missing or damaged, holds more than plain containers, or something else than a state.
    """
    file = folder / STATE
    state = _loaded(file)
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise UserError(f"{file}: must hold the state of a run; give a checkpoint of one")
    check(state, str(file), schema, _REMEDY)
    for name, leaf in state["model"].items():
        if not is_marked(leaf) and not _is_weight(leaf):
            raise UserError(f"{file}: model.{name} must be a tensor of floats, got {_described(leaf)}; {_REMEDY}")
    return state


def _loaded(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next(line for line in reversed(str(error).splitlines()) if line.strip())
        raise UserError(f"{file}: holds more than tensors and plain containers, and is not read: {reason}") from None
    except Exception as error:  # a damaged pickle raises whatever its broken instructions lead to
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file}: cannot be read: {reason}; {_REMEDY}") from None


def _is_weight(leaf: object) -> bool:
    """Whether it is a tensor of floats, every one of which is stored: a stride of 0 makes billions out of one."""
    return (
        isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.layout == torch.strided
        and leaf.numel() * leaf.element_size() <= leaf.untyped_storage().nbytes()
    )


def _described(leaf: object) -> str:
    return f"{leaf.dtype} of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
