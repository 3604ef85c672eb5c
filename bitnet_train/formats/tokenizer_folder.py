"""The files beside tokenizer.json that say which tokens have a role, and the chat templates.

tokenizer_config.json, special_tokens_map.json     roles; older files have them in the second alone
chat_template.jinja, additional_chat_templates/    templates, as transformers 5 writes them
generation_config.json                             ids at which a generation ends
"""

from collections.abc import Mapping
from pathlib import Path

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import read_json
from bitnet_train.formats.schemas import GenerationConfig, TokenizerConfig


def read_config(folder: Path) -> dict[str, object]:
    """tokenizer_config.json, with what the other files say.

    Raises:
        UserError: a file is no JSON object, no UTF-8, or a field has another type.
    """
    files = (folder / name for name in ("special_tokens_map.json", "tokenizer_config.json"))
    roles, config = (_read_object(file, TokenizerConfig) for file in files)
    config = {**roles, **config}
    config.pop("auto_map", None)  # names code to be run
    templates = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        templates = {"default": folder / "chat_template.jinja", **templates}
    texts = {name: _read_text(file) for name, file in templates.items()}
    if texts:
        several = [{"name": name, "template": text} for name, text in texts.items()]
        config["chat_template"] = texts["default"] if list(texts) == ["default"] else several
    return config


def templates_of(config: Mapping[str, object]) -> dict[str, str]:
    """The chat templates of a config by name, "default" among them or the only one; empty where it has none."""
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    entries = [entry for entry in given if isinstance(entry, Mapping)] if isinstance(given, list) else []
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {name: template for name, template in named.items() if isinstance(template, str)}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8: {error}; write it anew or remove it") from None


def _read_object(file: Path, schema: type) -> dict[str, object]:
    """The object in a JSON file, empty where there is no such file."""
    return read_json(file, schema) if file.is_file() else {}


def read_stop_ids(folder: Path) -> list[int]:
    """The ids at which generation_config.json says that a generation ends."""
    given = _read_object(folder / "generation_config.json", GenerationConfig).get("eos_token_id")
    return [id for id in (given if isinstance(given, list) else [given]) if type(id) is int]


def token_of(entry: object) -> str | None:
    """The text of a special token, which may be stored as {"content": text, ...}."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None
