"""Where the YAML is, how `+recipe=NAME` is found, and how a YAML node becomes a checked object.

recipes/NAME.yaml   is registered in Hydra's ConfigStore (group "recipe", package _global_) before Hydra runs, because
                    Hydra names a group after its folder and would look for conf/recipe/. This works the same in a
                    checkout, in an installed wheel and in sweeps, and a user's own recipes still come by --config-dir.
schedule: {...}     of a recipe is stored once for each schedule, with the rates that this schedule has (group
                    "recipe_schedule"), so that `schedule=constant` keeps a recipe's peak_lr and leaves its end_lr out.
_target_: a.b.C     names a frozen dataclass; `build` merges the node into its fields, so that unknown keys and wrong
                    types are errors before anything runs, and the ranges are checked by the class itself.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train import composition
from bitnet_train.classes import class_named
from bitnet_train.errors import UserError

_PACKAGE = Path(__file__).parent
_MAY_BE_ABSENT = {"callbacks", "logger", "launcher", "hparams_search"}  # groups that may have no keys
_START = time.strftime("%Y-%m-%d_%H-%M-%S")


def _data_folder(name: str) -> Path:
    """conf/ or recipes/: beside the package in a checkout, inside it in a wheel."""
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


CONF_DIR = _data_folder("conf")
RECIPES_DIR = _data_folder("recipes")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def register() -> None:
    """Makes recipes, resolvers and the checks of `composition` known to Hydra. Call before hydra.main runs."""
    store = ConfigStore.instance().store
    keys = {path.stem: set(OmegaConf.load(path)) for path in (CONF_DIR / "schedule").glob("*.yaml")}
    for path in RECIPES_DIR.glob("*.yaml"):
        recipe = OmegaConf.load(path)
        assert isinstance(recipe, DictConfig)
        for shape, rates in _by_shape(recipe.pop("schedule", {}), keys).items():
            store(group="recipe_schedule", name=f"{path.stem}-{shape}", node=rates, package="schedule")
        store(group="recipe", name=path.stem, node=recipe, package="_global_")
    OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
    composition.install()


def _by_shape(rates: Mapping[Any, Any], keys: Mapping[str, set[Any]]) -> dict[str, dict[Any, Any]]:
    """For every schedule what it takes of a recipe's rates: all but what other schedules have and it has not.

    Args:
        rates: what the recipe sets, whatever the schedule.
        keys: what each schedule has, by its name.
    """
    foreign = {shape: set().union(*keys.values()) - own for shape, own in keys.items()}
    return {shape: {key: rates[key] for key in rates if key not in foreign[shape]} for shape in keys}


def run_id() -> str:
    """Names a run: the SLURM job, so that a requeued job finds its folder again, or the time of the start.

    Ranks that torchrun started are named after their common launch: each has a time of its own.
    """
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or _START


@dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever its stage. Sizes in rows, intervals in optimizer steps; see conf/train.yaml."""

    recipe_name: str
    run_dir: str
    init_from: str | None
    resume: str
    resume_allow: list[str]
    seed: int
    max_steps: int | None
    max_tokens: int | None
    max_epochs: float | None
    global_batch_size: int
    micro_batch_size: int
    quantization_warmup_steps: int
    checkpoint_every: int
    keep_last: int
    keep_best: int
    skip_nonfinite: int
    log_every: int
    health_every: int
    val_every: int
    rank_timeout: float
    objective: str
    dry_run: bool

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "checkpoint_every", "log_every", "val_every"):
            _at_least_one(name, getattr(self, name))
        for name in ("max_steps", "max_tokens", "max_epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if (self.max_steps, self.max_tokens, self.max_epochs) == (None, None, None):
            raise UserError("set max_steps, max_tokens or max_epochs: the run has no end")
        if self.quantization_warmup_steps < 0:
            raise UserError(f"quantization_warmup_steps must be at least 0, got {self.quantization_warmup_steps}")
        if self.keep_last < 0:
            raise UserError(f"keep_last must be at least 0 (0 keeps all), got {self.keep_last}")
        if self.keep_best < 0:
            raise UserError(f"keep_best must be at least 0 (0 looks at no loss), got {self.keep_best}")
        if self.skip_nonfinite < 0:
            raise UserError(f"skip_nonfinite must be at least 0 (0 stops at once), got {self.skip_nonfinite}")
        if not self.rank_timeout > 0:
            raise UserError(f"rank_timeout must be above 0 seconds, got {self.rank_timeout}")
        if self.health_every < 0:
            raise UserError(f"health_every must be at least 0 (0 measures nothing), got {self.health_every}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


def run_config(config: DictConfig) -> RunConfig:
    """The run's own fields, with every group's node left out."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    for name in sorted(groups - _MAY_BE_ABSENT):
        if not isinstance(config.get(name), DictConfig):
            raise UserError(f"{name} must be keys with values, got {config.get(name)!r}; mend the recipe")
    own = {key: value for key, value in config.items() if key not in groups}
    if own.get("recipe_name") is None:
        raise UserError(f"no recipe was chosen; add +recipe=NAME with one of {', '.join(recipe_names())}")
    built = _structured(RunConfig, own, "")
    assert isinstance(built, RunConfig)
    return built


def build(node: DictConfig, name: str) -> Any:
    """The frozen dataclass that the node's `_target_` names, made of the node's other keys.

    Raises:
        UserError: there is no such class, a key is unknown or missing, or a value has the wrong type or range.
    """
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    target = str(values.pop("_target_", ""))
    own = f"{name}._target_ must name a dataclass of this package"
    if not target.startswith(f"{__package__}."):
        raise UserError(f"{own}, got {target!r}")
    cls = class_named(target, f"{name}._target_", (object,))
    if not is_dataclass(cls):
        raise UserError(f"{own}, got {target!r}")
    return _structured(cls, values, f"{name}.")


def _structured(cls: Any, values: dict[Any, Any], prefix: str) -> Any:
    known = {field.name: field for field in fields(cls)}
    for key in values:
        _check_width(values[key], f"{prefix}{key}")
        if key not in known:
            meant = composition.nearest(str(key), known)
            raise UserError(f"unknown key {prefix}{key}{composition.did_you_mean(meant and prefix + meant)}")
    for key, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if key not in values and required:
            raise UserError(f"{prefix}{key} is missing")
    # OmegaConf makes a node of a frozen dataclass read-only before it has filled it, so those are built one by one.
    nested = {
        key: _structured(inner, values[key], f"{prefix}{key}.")
        for key, inner in _dataclass_fields(cls).items()
        if isinstance(values.get(key), dict)
    }
    flat = {key: value for key, value in values.items() if key not in nested}
    try:
        built: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), flat))
        return replace(built, **nested)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{prefix}{error.full_key or ''}: {message}") from error


def _check_width(value: object, field: str) -> None:
    """Libraries take whole numbers of 64 bits; what is added to one (a seed, a count) fits, too, below half of that."""
    if isinstance(value, int) and not -(1 << 62) <= value < 1 << 62:
        raise UserError(f"{field} must lie between -2^62 and 2^62, got {value}")


def _dataclass_fields(cls: Any) -> dict[str, Any]:
    """The fields that are a dataclass, or one or None, and that dataclass."""
    hints = {name: (hint, *get_args(hint)) for name, hint in get_type_hints(cls).items()}
    return {name: inner for name, types in hints.items() for inner in types if is_dataclass(inner)}
