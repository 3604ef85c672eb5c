"""docs/configuration.md from the code: every key of a run with its type, its value under each option, and its meaning.

python tools/write_configuration_reference.py [OUT.md]        OUT is docs/configuration.md if left out

    conf/train.yaml, RunConfig          the keys of every run
    conf/GROUP/OPTION.yaml              the options of a group; the comment at the top says what one is
    the dataclass behind `_target_`     types, defaults, and the meaning of a field: its entry under Attributes

Where no class says what a key means, the comment beside it in the YAML does.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from omegaconf import OmegaConf

import bitnet_train
from bitnet_train.config import CONF_DIR, RunConfig
from bitnet_train.errors import ArgumentParser, run_command
from bitnet_train.formats.atomic import atomic_file

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_HEAD = """\
# Configuration

Every key of a run. This page is written from the code, by `python tools/write_configuration_reference.py`.

    python -m bitnet_train +recipe=NAME [group=option ...] [group.key=value ...]
    python -m bitnet_train +recipe=NAME ... --cfg job --resolve        # what a run would have, in under a second

A recipe chooses one option of each group and sets what differs ([recipes and schedules](recipes-and-schedules.md));
what is typed behind it wins. The tables show what an option sets; an empty cell is a key that the option does not have.
An unknown key, a wrong type and a value out of range are errors of one line before anything runs.
"""
_SECTION = re.compile(r"^(?:Attributes|Args):\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_KEY = re.compile(r"^( *)([\w/]+):(?:[^#'\"]|'[^']*'|\"[^\"]*\")*(?:# *(.*))?$")
BAR = "\\|"  # in a cell of a table


class Option(NamedTuple):
    """An option of a group: the comment at its top, its values and the comments beside them, both by dotted key.

    `prefix` is what comes before its keys in the whole configuration.
    """

    name: str
    prefix: str
    what: str
    values: dict[str, Any]
    comments: dict[str, str]

    @property
    def target(self) -> str:
        """The class that the whole option makes; empty where there is none."""
        return str(self.values.get("_target_", ""))


def read_option(path: Path, group: str = "") -> Option:
    """Reads conf/GROUP/OPTION.yaml."""
    text = path.read_text(encoding="utf-8")
    prefix = "" if not group or text.startswith("# @package _global_") else f"{group}."
    top = re.match(r"(?:# @package.*\n)?((?:# ?\S.*\n)*)", text)
    what = " ".join(line.lstrip("# ") for line in top[1].splitlines()) if top else ""
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    values = {key: value for key, value in _flat(node) if key != "defaults"}
    return Option(path.stem, prefix, what, values, dict(_comments(text)))


_NOTHING = Option("", "", "", {}, {})


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, comment beside it); keys nest by two spaces."""
    path: list[str] = []
    for line in text.splitlines():
        if match := _KEY.match(line):
            path[len(match[1]) // 2 :] = [match[2]]
            if match[3]:
                yield ".".join(path), match[3]


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field or argument; the class's own word counts."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = "\n".join(line.removeprefix("    ") for line in (base.__doc__ or "").splitlines())
        for section in _SECTION.findall(text):
            found |= {name: re.sub(r"\s+", " ", meaning) for name, meaning in _ENTRY.findall(section)}
    return found


def class_of(target: str) -> type | None:
    """The class of this package that a `_target_` names; None for others'."""
    module, _, name = target.rpartition(".")
    if not module.startswith(bitnet_train.__name__):
        return None
    cls = getattr(importlib.import_module(module), name)
    assert isinstance(cls, type), target
    return cls


def nested_classes(cls: type) -> dict[str, type]:
    """The fields that are a dataclass, or one or None, and that dataclass."""
    types = [(name, t) for name, hint in get_type_hints(cls).items() for t in (hint, *get_args(hint))]
    return {name: t for name, t in types if isinstance(t, type) and dataclasses.is_dataclass(t)}


def type_name(hint: object) -> str:
    """A type as people write it: int | None, list[str], RopeScaling."""
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return "any" if hint is Any else re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name)


def code(value: object) -> str:
    """A value as it is typed in YAML."""
    if value is dataclasses.MISSING:
        return "required"
    return f"`{value or repr(value) if isinstance(value, str) else json.dumps(value)}`"


class Key(NamedTuple):
    """A key of an option, in Markdown: its type, its value and its meaning, each empty where nothing says it."""

    type: str
    value: str
    meaning: str


def keys_of(cls: type, option: Option) -> dict[str, Key]:
    """The fields of a dataclass, with what an option sets; the comments of the option stand in for its docstring."""
    hints, words = get_type_hints(cls), meanings(cls)
    found = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        meaning = words.get(field.name) or option.comments.get(field.name, "")
        assert meaning, f"{cls.__name__}.{field.name}: say under Attributes what it means"
        value = code(option.values.get(field.name, made))
        found[f"{option.prefix}{field.name}"] = Key(f"`{type_name(hints[field.name])}`", value, meaning)
    return found


def plain_keys(option: Option) -> dict[str, Key]:
    """What an option sets for something that is no dataclass of this package."""
    words = dict(option.comments)
    for key, target in option.values.items():
        if key.rpartition(".")[2] == "_target_" and (cls := class_of(str(target))):
            words |= {f"{key.removesuffix('_target_')}{name}": text for name, text in meanings(cls).items()}
    values = {key: value for key, value in option.values.items() if key != "_target_"}
    return {f"{option.prefix}{key}": Key("", code(value), words.get(key, "")) for key, value in values.items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in line)} |" for line in lines)


def keys_table(columns: Mapping[str, Mapping[str, Key]]) -> str:
    """Keys downwards, options to the right; the cell of an option that lacks a key is empty."""
    rows = []
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        entries = [column.get(key, Key("", "", "")) for column in columns.values()]
        kind, meaning = (next(filter(None, texts), "") for texts in list(zip(*entries, strict=True))[::2])
        rows.append([f"`{key}`", kind, *(entry.value for entry in entries), meaning.removesuffix(".")])
    return table(["key", "type", *columns, "meaning"], rows)


def group_section(folder: Path) -> Iterator[str]:
    """A group: its options, the keys that they set, and the dataclasses that are fields of theirs."""
    group, options = folder.name, [read_option(path, folder.name) for path in sorted(folder.glob("*.yaml"))]
    yield f"## {group}"
    yield table(["option", "what it is", "class"], ([f"`{group}={o.name}`", o.what, _class_cell(o)] for o in options))
    columns: dict[str, dict[str, Key]] = {}
    inner: dict[str, type] = {}
    for option in options:
        cls = class_of(option.target)
        if cls is not None and dataclasses.is_dataclass(cls):
            columns[option.name] = keys_of(cls, option)
            inner |= nested_classes(cls)
        elif any(value is not None for value in option.values.values()):
            columns[option.name] = plain_keys(option)
    if columns:
        yield keys_table(columns)
    for name, cls in inner.items():
        yield f"`{group}.{name}`, where it is set:"
        yield keys_table({"default": keys_of(cls, _NOTHING._replace(prefix=f"{group}.{name}."))})


def _class_cell(option: Option) -> str:
    return f"`{option.target.rpartition('.')[2]}`" if option.target else ""


def run_section() -> Iterator[str]:
    """The keys of every run."""
    yield "## Every run"
    yield keys_table({"default": keys_of(RunConfig, read_option(CONF_DIR / "train.yaml"))})


def page() -> str:
    """The whole page."""
    groups = sorted(folder for folder in CONF_DIR.iterdir() if folder.is_dir())
    parts = [*run_section(), *(part for folder in groups for part in group_section(folder))]
    return "\n\n".join([_HEAD.strip(), *parts]) + "\n"


def main() -> None:
    """Reads the command line and writes the page."""
    parser = ArgumentParser(description="Write docs/configuration.md from the code.")
    parser.add_argument("out", metavar="OUT.md", type=Path, nargs="?", default=PAGE, help="default: %(default)s")
    out = parser.parse_args().out
    out.parent.mkdir(exist_ok=True)
    with atomic_file(out) as file:
        file.write_text(page(), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    run_command(main)
