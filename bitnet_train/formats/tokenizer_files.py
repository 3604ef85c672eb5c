"""The tokenizer of a model folder: which ids begin and stop a text, and what GGUF wants to know of it.

tokenizer.json (Hugging Face tokenizers) holds a byte-level BPE: vocabulary, merges, added tokens, and the regular
expression that cuts a text before merging. GGUF keeps the same facts under `tokenizer.ggml.*`, but only the NAME of the
expression, `tokenizer.ggml.pre`: a wrong or absent name tokenises differently without an error (microsoft/BitNet#508).
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import GENERATION_CONFIG, TOKENIZER_FILES, read_json

BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"  # LLaMA-3's names

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {_LLAMA_3: "llama-bpe", "ByteLevel": "gpt-2"}  # ByteLevel's own expression is GPT-2's


class TokenType(IntEnum):
    """The numbers of `tokenizer.ggml.token_type` (llama.cpp, enum llama_token_type)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a folder, with the config.json of its model.

    Raises (every method):
        UserError: a file is missing or damaged, or the tokenizer does not fit the model or GGUF.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """tokenizer.json."""
        return self.folder / "tokenizer.json"

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return read_json(self.path)

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.folder / "tokenizer_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token, added ones included; empty where the folder has no tokenizer.json."""
        if not self.path.is_file():
            return {}
        added = {token["content"]: token["id"] for token in self._tokenizer.get("added_tokens", [])}
        vocabulary = self._tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram's: [token, score] in id order
            vocabulary = {token: id_ for id_, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **added}

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text; None where neither config.json nor the tokenizer has one."""
        return next(iter(self._special("bos", BEGIN_OF_TEXT)), None)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text; None where neither config.json nor the tokenizer has one."""
        return next(iter(self._special("eos", END_OF_TEXT)), None)

    @property
    def stop_ids(self) -> list[int]:
        """Every id at which generation stops: EOS, those of generation_config.json, and LLaMA-3's end of a turn."""
        path = self.folder / GENERATION_CONFIG
        given = read_json(path).get("eos_token_id") if path.is_file() else None
        listed = given if isinstance(given, list) else [given]
        more = [id_ for id_ in listed if type(id_) is int and 0 <= id_ < self.config["vocab_size"]]
        turn = [self.ids[END_OF_TURN]] if END_OF_TURN in self.ids else []
        return list(dict.fromkeys([*self._special("eos", END_OF_TEXT), *more, *turn]))

    @property
    def _end_of_turn(self) -> int | None:
        """The id that ends a turn and no text: LLaMA-3's, or another at which generation stops."""
        others = [id_ for id_ in self.stop_ids if id_ != self.eos_id]
        return self.ids.get(END_OF_TURN, next(iter(others), None))

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text: a prompt that the chat template makes has it if that writes it.

        llama.cpp takes BOS away from such a prompt before it adds its own.
        """
        if self.bos_id is None or self._tokenizer_config.get("add_bos_token") is False:
            return False
        return self.chat_template is None or "bos_token" in _COMMENT.sub("", self.chat_template)

    @cached_property
    def chat_template(self) -> str | None:
        """The template: chat_template.jinja, or the one in tokenizer_config.json (the one named default of several)."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def check(self) -> None:
        """Refuses a tokenizer whose ids have no row in the embedding."""
        size, largest = self.config["vocab_size"], max(self.ids.values(), default=-1)
        if largest >= size:
            raise UserError(f"{self.path}: every id must be below the model's vocab_size ({size}), got {largest}")

    def write(self, folder: Path) -> None:
        """Copies the files into a folder."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The ids of generation_config.json: bos_token_id, and eos_token_id with every stop id."""
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.stop_ids or None, "pad_token_id": self._pad_id}
        return {name: value for name, value in ids.items() if value is not None}

    def gguf_metadata(self) -> dict[str, object]:
        """The `tokenizer.*` keys of a GGUF file, with as many tokens as the model's vocab_size."""
        if (kind := self._tokenizer.get("model", {}).get("type")) != "BPE":
            raise UserError(f"{self.path}: model.type must be BPE for GGUF, got {kind!r}; use --format safetensors")
        pre, (tokens, types) = self._pre_tokenizer(), self._tokens()
        metadata: dict[str, object] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": self._merges(),
            "tokenizer.ggml.bos_token_id": self.bos_id,
            "tokenizer.ggml.eos_token_id": self.eos_id,
            "tokenizer.ggml.eot_token_id": self._end_of_turn,
            "tokenizer.ggml.padding_token_id": self.eos_id if self._pad_id is None else self._pad_id,
            "tokenizer.ggml.add_bos_token": self.begins_with_bos,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.chat_template": self.chat_template and _without_generation(self.chat_template),
        }
        return {key: value for key, value in metadata.items() if value is not None}

    @property
    def _pad_id(self) -> int | None:
        return next(iter(self._special("pad", None)), None)

    def _special(self, role: str, usual: str | None) -> list[int]:
        """The ids of a role: by config.json, else by tokenizer_config.json, else by the usual token's name."""
        given = self.config.get(f"{role}_token_id")
        if given is not None:
            return [self._checked(id_, role) for id_ in (given if isinstance(given, list) else [given])]
        token = self._tokenizer_config.get(f"{role}_token", usual)
        name = token["content"] if isinstance(token, dict) else token
        return [self.ids[name]] if name in self.ids else []

    def _checked(self, id_: int, role: str) -> int:
        size = self.config["vocab_size"]
        if not 0 <= id_ < size:
            raise UserError(f"{self.folder}/config.json: {role}_token_id must be below vocab_size ({size}), got {id_}")
        return id_

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Tokens and types in id order; ids that the tokenizer does not use become `[PAD<id>]`."""
        self.check()
        size = self.config["vocab_size"]
        tokens = [f"[PAD{id_}]" for id_ in range(size)]
        types, normal = [int(TokenType.UNUSED)] * size, int(TokenType.NORMAL)
        for token, id_ in self.ids.items():
            tokens[id_], types[id_] = token, normal
        for added in self._tokenizer.get("added_tokens", []):
            types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        return tokens, types

    def _merges(self) -> list[str]:
        """The merges, each as "left right"."""
        merges = self._tokenizer["model"].get("merges")
        if not merges:
            raise UserError(f"{self.path}: model.merges must not be empty for GGUF, got {merges!r}")
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name of the expression that cuts a text before merging."""
        normalizer = self._tokenizer.get("normalizer")
        if normalizer and normalizer.get("normalizers") != []:
            raise UserError(f"{self.path}: normalizer must be null for GGUF, which keeps none; got {normalizer}")
        pre = self._tokenizer.get("pre_tokenizer") or {}
        steps = pre.get("pretokenizers", [pre])
        cuts = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
        cuts += ["ByteLevel" for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
        byte_level = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
        if not byte_level or len(cuts) != 1 or cuts[0] not in PRE_TOKENIZERS:
            raise UserError(
                f"{self.path}: pre_tokenizer must be LLaMA-3's or GPT-2's for GGUF, which keeps no other; got {pre}"
            )
        return PRE_TOKENIZERS[cuts[0]]


def _without_generation(template: str) -> str:
    """The template with {% if true %} for {% generation %}: the same text, and no tag that llama.cpp's parsers lack."""
    return _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)
