"""The objects of Lightning that a configuration names by `_target_`: callbacks, loggers, the Trainer and what it takes.

Every class is checked before the first one is called, so that a recipe from somebody else calls nothing but classes of
these kinds. Arguments that take objects themselves are listed; elsewhere stands no `_target_` but that of a value, such
as datetime.timedelta.
"""

from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from bitnet_train.classes import check_object
from bitnet_train.errors import UserError

_TAKEN: dict[str, tuple[type, ...]] = {
    "accelerator": (Accelerator,),
    "strategy": (Strategy,),
    "profiler": (Profiler,),
    "plugins": (Precision, ClusterEnvironment, CheckpointIO, LayerSync),
    # of strategies
    "cluster_environment": (ClusterEnvironment,),
    "checkpoint_io": (CheckpointIO,),
    "precision_plugin": (Precision,),
}


def named(node: DictConfig, name: str, kind: type) -> list[Any]:
    """The objects of a group such as callbacks, where each has a name; see `checked`."""
    return [instantiate(one) for one in checked(node, name, kind)]


def checked(node: DictConfig, name: str, kind: type) -> list[DictConfig]:
    """The nodes of a group such as callbacks, where each has a name; null leaves one out.

    Raises:
        UserError: the class of one is none of this kind.
    """
    given = _resolved(node, name)
    wanted = [key for key, one in given.items() if one is not None]
    for key in wanted:
        if not isinstance(given[key], dict):
            raise UserError(f"{name}.{key} must have a _target_ and its arguments, got {given[key]!r}")
        check_object(given[key], f"{name}.{key}", (kind,))
    return [node[key] for key in wanted]


def trainer(node: DictConfig, **arguments: object) -> L.Trainer:
    """Lightning's Trainer.

    Args:
        node: `_target_` and options.
        arguments: what stands above the options of the node.

    Raises:
        UserError: it is no Trainer, or an option is no object of a kind that a Trainer takes there.
    """
    check_object(_resolved(node, "trainer"), "trainer", (L.Trainer,), _TAKEN)
    made: L.Trainer = instantiate(node, **arguments)
    return made


def _resolved(node: DictConfig, name: str) -> dict[str, Any]:
    if not isinstance(node, DictConfig):
        raise UserError(f"{name} must hold keys and values, got {node!r}")
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
