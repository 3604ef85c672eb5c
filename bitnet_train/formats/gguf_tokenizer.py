"""The tokenizer in a GGUF file, back as the files that Hugging Face reads: the inverse of `tokenizer_files`.

tokenizer.ggml.tokens, token_type     ->  vocabulary (1), special tokens (3), other added tokens (4); 5 is left out
tokenizer.ggml.merges                 ->  merges
tokenizer.ggml.pre                    ->  the expression that cuts a text; llama-bpe also takes a word that is a
                                          token as it is, without merging (ignore_merges)
bos, eos, eot, padding ids, template  ->  tokenizer_config.json and generation_config.json
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import write_json
from bitnet_train.formats.tokenizer_files import PRE_TOKENIZERS, TokenType

_PREFIX = "tokenizer."


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer among the keys of a GGUF file.

    Raises (every method):
        UserError: a key is missing, or the tokenizer is none that is written here.
    """

    path: Path
    metadata: Mapping[str, Any]

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, where there is one."""
        return self.metadata.get("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where there is one."""
        return self.metadata.get("tokenizer.ggml.eos_token_id")

    def check(self) -> None:
        """Nothing to refuse: the file has as many tokens as its embedding has rows."""

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text."""
        return bool(self.metadata.get("tokenizer.ggml.add_bos_token"))

    @property
    def stop_ids(self) -> list[int]:
        """Every id at which generation stops."""
        stop = [self.eos_id, self.metadata.get("tokenizer.ggml.eot_token_id")]
        return list(dict.fromkeys(id_ for id_ in stop if id_ is not None))

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The ids of generation_config.json: bos_token_id, pad_token_id, and eos_token_id with every stop id."""
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.stop_ids or None,
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        return {name: value for name, value in ids.items() if value is not None}

    def gguf_metadata(self) -> dict[str, object]:
        """The `tokenizer.*` keys as they are."""
        return {key: value for key, value in self.metadata.items() if key.startswith(_PREFIX)}

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into a folder."""
        write_json(folder / "tokenizer.json", self.tokenizer_json)
        write_json(folder / "tokenizer_config.json", self.tokenizer_config)

    @cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json: a byte-level BPE that puts BOS in front where the file says so."""
        tokens, types = self._required("tokens"), self._required("token_type")
        pairs = [(token, id_, kind) for id_, (token, kind) in enumerate(zip(tokens, types, strict=True))]
        added = [pair for pair in pairs if pair[2] in (TokenType.CONTROL, TokenType.USER_DEFINED)]
        vocabulary = {token: id_ for token, id_, kind in pairs if kind == TokenType.NORMAL}
        if [id_ for _, id_, _ in added] != list(range(len(vocabulary), len(vocabulary) + len(added))):
            raise UserError(f"{self.path}: tokenizer.ggml.tokens must end with the added tokens, got them elsewhere")
        return {
            "version": "1.0",
            "added_tokens": [_added_token(*token) for token in added],
            "pre_tokenizer": self._pre_tokenizer,
            "post_processor": self._begin(tokens),
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "ignore_merges": self._required("pre") == "llama-bpe",
                "vocab": vocabulary,
                "merges": [merge.split(" ") for merge in self._required("merges")],
            },
        }

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the names of the special tokens, and the chat template."""
        tokens = self._required("tokens")
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.metadata.get("tokenizer.ggml.padding_token_id")}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": tokens[id_] for role, id_ in ids.items() if id_ is not None},
            "chat_template": self.metadata.get("tokenizer.chat_template"),
        }
        said = {key: value for key, value in config.items() if value is not None}
        return said if self.bos_id is not None else said | {"bos_token": None}

    def _required(self, key: str) -> Any:
        if (value := self.metadata.get(f"tokenizer.ggml.{key}")) is None:
            raise UserError(f"{self.path}: key tokenizer.ggml.{key} must be there, got none; export the model again")
        return value

    @property
    def _pre_tokenizer(self) -> dict[str, Any]:
        name = self._required("pre")
        expressions = {known: expression for expression, known in PRE_TOKENIZERS.items()}
        if name not in expressions:
            raise UserError(f"{self.path}: tokenizer.ggml.pre must be one of {', '.join(expressions)}, got {name!r}")
        if expressions[name] == "ByteLevel":
            return {**_BYTE_LEVEL, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": expressions[name]}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}

    def _begin(self, tokens: list[str]) -> dict[str, Any] | None:
        """The post-processor that puts BOS in front."""
        if self.bos_id is None or not self.begins_with_bos:
            return None
        name = tokens[self.bos_id]
        begin = {"SpecialToken": {"id": name, "type_id": 0}}
        first, second = ({"Sequence": {"id": text, "type_id": type_id}} for type_id, text in enumerate("AB"))
        return {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
            "special_tokens": {name: {"id": name, "ids": [self.bos_id], "tokens": [name]}},
        }


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _added_token(content: str, id_: int, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, **flags, "special": kind == TokenType.CONTROL}
