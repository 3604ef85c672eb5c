"""What a checkpoint holds, collected from a run and put back into one.

    step, tokens, identity       where the run is, and which run it is
    skipped                      steps that were left out, see `StepGuard`
    model, optimizer, health     the same on every rank, or its rows of them
    ranks                        of every rank: its random generators, and its sums since the last log event

A group of the same size goes on bit for bit. Another one reads the same samples in the same order: what the ranks had
summed up goes to the first, and the random generators start anew from seed, step and rank.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from bitnet_train.errors import UserError
from bitnet_train.formats.shards import State, fill, outline
from bitnet_train.formats.state_file import STATE
from bitnet_train.training import ranks
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.parts import Parts, seed_everything
from bitnet_train.training.sharding import as_shard, mesh_of, own_part


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors, lists and strings."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def collect(parts: Parts) -> State:
    """The state of the run, on every rank. All ranks call it together."""
    module = parts.module
    own = {"rng": rng_state(), "since_log": {name: value.cpu() for name, value in module.since_log.values.items()}}
    return {
        "identity": parts.identity,
        "step": module.step,
        "tokens": module.tokens,
        "skipped": module.guard.skipped,
        "model": module.model.state_dict(),
        "optimizer": module.trainer.optimizers[0].state_dict(),
        "health": _as_shards(module),
        "ranks": ranks.gather(own),
    }


def _as_shards(module: TrainingModule) -> dict[str, Tensor]:
    """The codes of `TernaryHealth`, cut as the weights are that they belong to."""
    decoder = module.model.model.layers
    return {
        name: as_shard(codes, like=decoder.get_parameter(f"{name}.weight"))
        for name, codes in module.health.codes.items()
    }


def of_this_rank(state: State, seed: int) -> dict[str, Any]:
    """This rank's part of a state; see the module's text for a group of another size."""
    saved: list[dict[str, Any]] = state["ranks"]
    if len(saved) == ranks.count():
        return saved[ranks.rank()]
    seed_everything(seed + state["step"] * ranks.count() + ranks.rank())
    return {"rng": rng_state(), "since_log": _summed([own["since_log"] for own in saved]) if ranks.is_first() else {}}


def _summed(sums: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for values in sums for name in values}
    return {name: torch.stack([values[name] for values in sums if name in values]).sum(dim=0) for name in names}


class Found(NamedTuple):
    """A checkpoint to go on from: its folder, and what its state.pt holds."""

    folder: Path
    state: State


def check_weights(found: Found, model: nn.Module) -> None:
    """Compares the weights of a checkpoint with the model that is to go on.

    Raises:
        UserError: names or shapes differ.
    """
    stored = _shapes(outline(found.state["model"], found.folder))
    expected = _shapes(model.state_dict())
    differing = {name for name, _ in stored.items() ^ expected.items()}
    if differing:
        name = min(differing)
        raise UserError(
            f"{found.folder / STATE}: model.{name} must have the shape that it has in the model "
            f"({expected.get(name, 'absent')}), got {stored.get(name, 'absent')}; take another checkpoint"
        )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@contextmanager
def _refused_by(owner: str, file: Path) -> Iterator[None]:
    """An optimizer and a random generator know alone what fits them; what they refuse is the fault of the file.

    Raises:
        UserError: the refusal.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: does not fit the {owner} ({reason}); take another checkpoint") from error


class Restore(L.Callback):
    """Puts a checkpoint's weights, optimizer and random generators in place when the loop is about to start."""

    def __init__(self, found: Found | None, seed: int) -> None:
        self.found, self.seed = found, seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once: what follows is the run's own."""
        if self.found is None:
            return
        assert isinstance(pl_module, TrainingModule)
        (folder, state), self.found = self.found, None
        state = fill(state, folder, mesh_of(pl_module))
        own = of_this_rank(state, self.seed)
        pl_module.guard.skipped = state["skipped"]
        pl_module.model.load_state_dict(state["model"])
        with _refused_by("optimizer", folder / STATE):
            trainer.optimizers[0].load_state_dict(state["optimizer"])
        for values, saved in (
            (pl_module.since_log.values, own["since_log"]),
            (pl_module.health.codes, state["health"]),
        ):
            values.update({name: own_part(value).to(pl_module.device) for name, value in saved.items()})
        with _refused_by("random generators", folder / STATE):
            set_rng_state(own["rng"])
