"""The class that a `_target_` of the configuration names, checked before it is called.

A recipe may come from somebody else. To import a module runs it, and to call a function runs whatever somebody found:
so a target is module.Class; the module must be importable here and, where it is Python text that nothing has imported
yet, must define or import that name; and the class must be of a kind that its place takes. A few values that configure
such objects have no kind; they are known by name, and stand anywhere.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitnet_train.errors import UserError

_VALUES = ("datetime.timedelta", "torch.profiler.schedule")  # they compute a value of plain arguments, and do no more
_NONE: Mapping[str, tuple[type, ...]] = MappingProxyType({})


def class_named(target: object, field: str, kinds: tuple[type, ...]) -> type:
    """The class, of which nothing is called.

    Args:
        target: module.Class.
        field: the key that names it, for messages.
        kinds: classes, of one of which it must be a subclass.

    Raises:
        UserError: it is no class of these kinds; a module that does not hold the name was not imported.
    """
    wanted = (
        f"{field} must name a class of the kind {' or '.join(f'{kind.__module__}.{kind.__name__}' for kind in kinds)}"
    )
    module, _, name = str(target).rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UserError(f"{wanted}, as module.Class, got {target!r}")
    if module not in sys.modules and not _may_hold(module, name):
        raise UserError(
            f"{wanted}; no module {module!r} that holds a class {name!r} can be imported here, got {target!r}"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{wanted}, got {target!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise UserError(f"{wanted}, got {target!r}, which is none")
    return found


def check_object(
    node: Mapping[str, Any], field: str, kinds: tuple[type, ...], places: Mapping[str, tuple[type, ...]] = _NONE
) -> None:
    """Checks the class that a node names, and those of the objects among its arguments, before any is called.

    Args:
        node: `_target_` and arguments, with nothing left to resolve.
        field: the node's key, for messages.
        kinds: of the class, see `class_named`.
        places: the arguments that take objects, at any depth, and their kinds; elsewhere no `_target_` may stand, but
            that of a value such as datetime.timedelta.

    Raises:
        UserError: a class is none or of another kind, or an object stands where none is taken.
    """
    class_named(node.get("_target_"), f"{field}._target_", kinds)
    _check_arguments(node, field, places)


def _check_arguments(node: Mapping[str, Any], field: str, places: Mapping[str, tuple[type, ...]]) -> None:
    if node.get("_partial_", False) is not False:
        raise UserError(f"{field}._partial_ must be false: an object is wanted, no function; leave it out")
    for key, value in node.items():
        _check_argument(value, f"{field}.{key}", places.get(key, ()), places)


def _check_argument(value: object, field: str, kinds: tuple[type, ...], places: Mapping[str, tuple[type, ...]]) -> None:
    if isinstance(value, list):
        for number, part in enumerate(value):
            _check_argument(part, f"{field}.{number}", kinds, places)
    elif isinstance(value, dict) and "_target_" not in value:
        for key, part in value.items():
            _check_argument(part, f"{field}.{key}", (), places)
    elif isinstance(value, dict) and value["_target_"] in _VALUES:
        _check_arguments(value, field, _NONE)
    elif isinstance(value, dict) and not kinds:
        raise UserError(
            f"{field}._target_ must not stand there: no object is taken, got {value['_target_']!r}; remove it"
        )
    elif isinstance(value, dict):
        check_object(value, field, kinds, places)


def _may_hold(module: str, name: str) -> bool:
    """Whether the module can be found, and its text binds the name; nothing of it is run."""
    spec = _spec(module)
    origin = spec.origin if spec is not None else None
    if spec is None or origin is None:
        return False
    if not origin.endswith(".py"):
        return True  # compiled: it has no text
    try:
        tree = ast.parse(Path(origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_binds(node, name) for node in ast.walk(tree))


def _spec(module: str) -> ModuleSpec | None:
    """How the module would be imported; the packages that it lies in are not imported for that."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first) if first not in sys.modules else sys.modules[first].__spec__
    for number, _ in enumerate(rest, start=2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join([first, *rest][:number]), spec.submodule_search_locations)
    return spec


def _binds(node: ast.AST, name: str) -> bool:
    """A class of this name, an import of it or of everything, or names that a module makes when asked for (PEP 562)."""
    if isinstance(node, ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.ImportFrom):
        return any((alias.asname or alias.name) in (name, "*") for alias in node.names)
    return isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
