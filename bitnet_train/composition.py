"""Additions to Hydra's composition, for recipes and arguments that people type or get from somebody else.

    files           a YAML file is bounded before its aliases are expanded (`yaml_text`); a recipe may not set what of
                    Hydra's own keys runs programs
    hydra.*         callbacks, launcher, sweeper and sampler are classes of their kind, and no other object stands among
                    their arguments, checked before one is called (`classes`)
    paths           a `~` in front is the user's home
    errors          one line that names the argument, the quotes that it needs, or the key that was meant
    jobs            what a search hands on is quoted where Hydra's grammar needs it; what cannot be composed fails alone

`install` puts `Loader` in the place of Hydra's own loader: Hydra makes its callbacks as soon as it has composed, and
has no hook between.
"""

import copy
import difflib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import hydra as hydra_application
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.classes import check_object
from bitnet_train.errors import UserError
from bitnet_train.yaml_text import check_yaml, yaml_fault

REFUSED = "_refused_"  # the key of a job that cannot be composed: the reason

_PATHS = ("run_dir", "init_from", "resume", "data.train", "data.val", "data.tokenizer", "data.cache_dir")
_HYDRA_IN_RECIPES = re.compile(  # the rest can start programs or change the environment
    r"mode|(run|sweep)(\..*)?|sweeper\.(?!custom_search_space).*|job\.name|launcher\.(account|array_parallelism|comment|"
    r"constraint|cpus_per_gpu|cpus_per_task|exclude|gpus_per_node|gpus_per_task|gres|max_num_timeout|mem_gb|mem_per_cpu|"
    r"mem_per_gpu|name|nodes|partition|qos|signal_delay_s|stderr_to_stdout|tasks_per_node|timeout_min)"
)
_PLAIN = "A-Z a-z 0-9 / - + . $ % * @ ? | _ :"  # what Hydra's grammar takes without quotes
_EXTRAS = {"submitit": "slurm", "optuna": "sweep"}  # what an option of Hydra comes with


def install() -> None:
    """Makes Hydra compose as this module says."""
    SourcesRegistry.instance().types["file"] = FileConfigSource
    hydra_application.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of files, which are checked before they are read. Hydra knows it by the name of its class."""

    def load_config(self, config_path: str) -> ConfigResult:
        """The content of a file.

        Raises:
            UserError: it is too large, no YAML mapping, or a recipe that is more than one.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        try:
            check_yaml(path, path.read_text(encoding="utf-8"))
            result = super().load_config(config_path)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: {yaml_fault(error)}") from None
        except (OSError, ValueError, OmegaConfBaseException) as error:
            raise error if isinstance(error, UserError) else UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(result.config, DictConfig):
            raise UserError(f"{path}: must hold keys and values; mend the file")
        if config_path.startswith("recipe/"):
            _check_recipe(path, result.config, str(result.header.get("package")))
        return result


def _check_recipe(path: Path, recipe: DictConfig, package: str) -> None:
    """A recipe sets what a run is; what Hydra itself does with programs, logging and the environment is the user's."""
    others = [key for key in _hydra_keys(recipe) if not _HYDRA_IN_RECIPES.fullmatch(key)]
    if others or package.rpartition("_global_.")[2].startswith("hydra"):
        raise UserError(
            f"{path}: of Hydra's own keys a recipe may set mode, run, sweep, sweeper, job.name and how large a job of "
            f"the launcher is, got {', '.join(others) or 'another'}; give it on the command line"
        )


def _hydra_keys(recipe: DictConfig) -> list[str]:
    """The keys of Hydra's that a recipe sets, two levels deep, as they stand: an interpolation is no mapping."""
    written = OmegaConf.to_container(recipe, resolve=False)
    own = written.get("hydra", {}) if isinstance(written, dict) else {}
    if not isinstance(own, dict):
        return ["hydra"]
    flat = [key for key, value in own.items() if not isinstance(value, dict)]
    return [*map(str, flat), *(f"{key}.{name}" for key in own if key not in flat for name in own[key])]


class Loader(ConfigLoaderImpl):
    """Hydra's loader, with checks behind it and messages of one line."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """The configuration that files and arguments give.

        Raises:
            UserError: they give none, or one that may not be.
        """
        options = (config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        try:
            config = super().load_configuration(*options)
            check_hydra(config.hydra)
        except UserError:
            raise
        except Exception as error:  # all of it is the user's, and Hydra raises what Python does for a wrong type
            raise UserError(self._unknown_key(error, *options) or explained(error)) from error
        expand_home(config)
        return config

    def _unknown_key(self, error: Exception, config_name: str | None, overrides: list[str], *options: Any) -> str:
        """Of an argument whose key is not there: the key that was meant. Empty for another error."""
        found = re.match(r"Could not override '([^']+)'", str(error))
        if found is None:
            return ""
        key, others = found[1], [override for override in overrides if not override.startswith(f"{found[1]}=")]
        try:
            meant = _nearest_key(super().load_configuration(config_name, others, *options), key.split("."))
        except HydraException:  # it is not the only error
            meant = ""
        return f"unknown key {key}{did_you_mean(meant) or f'; where a library takes it, add it as +{key}'}"

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of a job; where there is none, one that says why under `REFUSED`."""
        overrides = [quoted_for_job(override) for override in sweep_overrides]
        try:
            return super().load_sweep_config(master_config, overrides)
        except UserError as error:
            config = copy.deepcopy(master_config)
            with open_dict(config):
                config[REFUSED] = str(error)
                config.hydra.overrides.task = sweep_overrides
            return config


def check_hydra(node: DictConfig) -> None:
    """Checks the classes that Hydra makes of its own keys, before it does.

    Raises:
        UserError: a callback, the launcher, the sweeper or its sampler is no class of that kind, an object stands among
            their arguments, or a text would be more than one line of a job's script.
    """
    for name, callback in (node.get("callbacks") or {}).items():
        check_object(_resolved(callback), f"hydra.callbacks.{name}", (Callback,))
    _check_launcher(_resolved(node.launcher))
    _check_sweeper(_resolved(node.sweeper))


def _check_launcher(launcher: dict[str, Any]) -> None:
    check_object(launcher, "hydra.launcher", (Launcher,))
    for key, value in launcher.items():
        if isinstance(value, str) and "\n" in value:  # the second line would be a command of the script
            raise UserError(f"hydra.launcher.{key} must be one line, got {value!r}; mend what it is made of")


def _check_sweeper(sweeper: dict[str, Any]) -> None:
    places: dict[str, tuple[type, ...]] = {}
    if isinstance(sampler := sweeper.get("sampler"), dict):
        from optuna.samplers import BaseSampler

        sampler.pop("_partial_", None)  # the grid's is one: it gets its space later
        places = dict.fromkeys(("sampler", "independent_sampler", "base_sampler"), (BaseSampler,))
    check_object(sweeper, "hydra.sweeper", (Sweeper,), places)


def _resolved(node: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_dict(node) else {}
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def expand_home(config: DictConfig) -> None:
    """Writes the user's home for a `~` in front of any path of the configuration."""
    there = [key for key in ("run_dir", "init_from", "resume", "data") if key in config]
    values = OmegaConf.create(OmegaConf.to_container(OmegaConf.masked_copy(config, there), resolve=False))
    for key in _PATHS:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.to_container(OmegaConf.select(values, parent) if parent else values, resolve=False)
        path = node.get(name) if isinstance(node, dict) else None
        if (expanded := _expanded(path)) != path:
            OmegaConf.update(config, key, expanded, merge=False)


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def explained(error: Exception) -> str:
    """A message of Hydra's without its layout, with what exists in place of what was not found."""
    if isinstance(error, OverrideParseException):
        return _unquoted(error.override)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _no_option(error.missing_cfg_file, error.options)
    text = ": ".join(_text_of(one) for one in (error, error.__cause__) if one is not None and str(one))
    for plugin, extra in _EXTRAS.items():
        if f"hydra/launcher/{plugin}" in text or f"hydra/sweeper/{plugin}" in text:
            return f"this needs the extra `{extra}`; install it: pip install 'bitnet-train[{extra}]'"
    return text or type(error).__name__


def _text_of(error: BaseException) -> str:
    return " ".join(str(error).split())


def _no_option(path: str, options: Iterable[str]) -> str:
    group, _, name = path.rpartition("/")
    names = sorted(options)
    said = f"unknown recipe {name!r}; the recipes are" if group == "recipe" else f"{group} has no {name!r}; it has"
    return f"{said} {', '.join(names)}{did_you_mean(nearest(name, names))}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that is most like one that is not there, "" for none."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), "")


def did_you_mean(name: str) -> str:
    """The end of a message about a name that is not there."""
    return f"; did you mean {name}?" if name else ""


def _nearest_key(config: DictConfig, parts: list[str]) -> str:
    """The key that is most like one that is not there, "" for none."""
    node: Any = config
    for number, part in enumerate(parts):
        keys = [str(key) for key in node] if isinstance(node, DictConfig) else []
        if part not in keys:
            found = nearest(part, keys)
            return ".".join([*parts[:number], found, *parts[number + 1 :]]) if found else ""
        node = node[part]
    return ""


def _unquoted(override: str) -> str:
    """An argument that Hydra's grammar refuses, and how a shell takes it in quotes."""
    key, equals, value = override.partition("=")
    quoted = {"{": [], "[": [_parts_quoted(value)]}.get(value[:1], [_parts_quoted(value), _quoted(value)])
    for argument in (f"{key}={one}" for one in quoted if equals):
        if _is_plain(argument):
            return f"{override}: a text with other signs than {_PLAIN} needs quotes; write {shlex.quote(argument)}"
    return (
        f"{override}: no argument that Hydra understands; write key=value, and a text in it with other signs than "
        f"{_PLAIN} in quotes: 'key=[\"größe\"]'"
    )


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.double).with_quotes())


def _parts_quoted(value: str) -> str:
    """The value with those of its parts quoted that need it: of [a, b], choice(a, b) or a,b."""
    found = re.fullmatch(r"(\[|\w+\(|)(.*?)(\]|\)|)", value, re.DOTALL)
    assert found is not None
    if re.search(r"[\[\]{}'\"]", found[2]):  # commas within these part nothing
        return value
    parts = [part.strip() for part in found[2].split(",")]
    return found[1] + ",".join(part if _is_plain(f"key={part}") else _quoted(part) for part in parts) + found[3]


def _is_plain(override: str) -> bool:
    """Whether Hydra's grammar takes an override."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def quoted_for_job(override: str) -> str:
    """An override of a job as Hydra reads it: a sampler hands texts on without the quotes that they were written in."""
    key, equals, value = override.partition("=")
    if equals and (not _is_plain(override) or OverridesParser.create().parse_override(override).is_sweep_override()):
        return f"{key}={_quoted(value)}"
    return override
