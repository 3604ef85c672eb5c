"""README.md of a model folder as the hub reads it: YAML between two lines of dashes, then Markdown."""

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import MAX_DEPTH, is_deep

MAX_CHARACTERS = 10_000_000  # a thousand times a long configuration
_DASHES = "---\n"


def split_card(folder: Path) -> tuple[str, str]:
    """Front matter and body of a folder's card; both empty where it has none."""
    path = folder / "README.md"
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8: {error}; mend or remove it") from None
    if not card.startswith(_DASHES):
        return "", card
    front_matter, _, body = card.removeprefix(_DASHES).partition(f"\n{_DASHES}")
    return front_matter, body


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's card names.

    Raises:
        UserError: the front matter is no YAML.
    """
    licence = read_yaml(folder / "README.md", split_card(folder)[0]).get("license")
    return licence if isinstance(licence, str) else None


def read_yaml(path: Path, text: str) -> Mapping[str, Any]:
    """The mapping in a YAML text, empty where it holds something else.

    Raises:
        UserError: it is no YAML, or too large with its aliases written out; the message names the file.
    """
    try:
        content = _loaded(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that no calendar has is a ValueError
        raise UserError(f"{path}: must be YAML: {error}; mend or remove it") from None
    return content if isinstance(content, Mapping) else {}


def _loaded(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS:,} characters, its aliases written out")
        content = loader.construct_document(node) if node is not None else None
        if is_deep(content):
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        return content
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The characters that a node stands for, those of an alias wherever it is used; infinite if it holds itself.

    Args:
        sizes: of the nodes that were seen before, by identity.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        if isinstance(node, yaml.ScalarNode):
            sizes[id(node)] = 1 + len(node.value)
        else:
            parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
