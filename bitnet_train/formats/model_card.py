"""README.md of a model folder as the hub reads it: YAML between two lines of dashes, then Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bitnet_train.errors import UserError

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
        UserError: it is no YAML; the message names the file that it came from.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: must be YAML: {error}; mend or remove it") from None
    return content if isinstance(content, Mapping) else {}
