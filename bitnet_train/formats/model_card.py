"""README.md of a model folder as the hub reads it: YAML between two lines of dashes, then Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import UserError
from bitnet_train.yaml_text import check_yaml

_DASHES = "---\n"
_NO_YAML = (yaml.YAMLError, ValueError, AttributeError)  # 2024-99-99 is no date, and `!!timestamp x` has no attribute


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
        UserError: it is no YAML, or more of it than a card or a configuration has; the message names the file.
    """
    check_yaml(path, text)
    try:
        content = yaml.safe_load(text)
    except _NO_YAML as error:
        raise UserError(f"{path}: must be YAML: {error}; mend or remove it") from None
    return content if isinstance(content, Mapping) else {}
