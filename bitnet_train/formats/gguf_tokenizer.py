"""The tokenizer in a GGUF file, back as the files that Hugging Face reads: the inverse of `tokenizer_files`.

tokenizer.ggml.tokens, token_type     ->  vocabulary (1), special tokens (3), other added tokens (4); 5 is left out
tokenizer.ggml.merges                 ->  merges
tokenizer.ggml.pre                    ->  how a text is cut, and whether a word that is a token is merged all the same
bos, eos, eot, padding ids, template  ->  tokenizer_config.json and generation_config.json

The types are read as the runtimes do, which go by some names instead: a prompt that holds `<|im_end|>` ends a turn
there, whatever the file says. Source: src/llama-vocab.cpp of ik_llama.cpp and llama.cpp, `llama_vocab::impl::load`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import check, write_json
from bitnet_train.formats.pre_tokenizers import BYTE_LEVEL, PRE_TOKENIZERS, PreTokenizer, steps_of
from bitnet_train.formats.schemas import GGUF_TOKENIZER
from bitnet_train.formats.tokenizer_faults import tokenizer_faults
from bitnet_train.formats.tokenizer_files import END_OF_TURN, STOPS_BY_NAME, Roles, TokenType, unchanged

_PREFIX = "tokenizer."
_OTHERWISE = "give --tokenizer a folder with tokenizer.json"
_READ = (
    *("tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"),
    *("tokenizer.ggml.add_eos_token", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"),
    *("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.padding_token_id"),
)
_CONTROL_BY_NAME = {
    *STOPS_BY_NAME,
    *("</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|file_sep|>", "<|repo_name|>", "<REPO>", "<reponame>"),
    *(
        form.format(part)
        for form in ("<|fim_{}|>", "<fim-{}>")
        for part in ("prefix", "suffix", "middle", "pad", "repo")
    ),
    *(f"<fim_{part}>" for part in ("prefix", "suffix", "middle", "pad")),
    *(f"<|code_{part}|>" for part in ("prefix", "suffix", "middle")),
    *(f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end")),
    *(f"{space}<{part}>" for space in ("", "\u2581") for part in ("PRE", "SUF", "MID")),
    "<PAD>",
}
_USER_DEFINED_BY_NAME = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer among the keys of a GGUF file.

    Attributes:
        path: the file, for messages.
        metadata: its keys.
        renewed: as in `TokenizerFiles`.

    Raises (every method):
        UserError: a key is missing, or the tokenizer is none that is written here.
    """

    path: Path
    metadata: Mapping[str, Any]
    renewed: Callable[[str, bool], str] = unchanged

    def __post_init__(self) -> None:
        check(self.metadata, str(self.path), GGUF_TOKENIZER)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, where there is one."""
        return self.metadata.get("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where there is one."""
        return self.metadata.get("tokenizer.ggml.eos_token_id")

    def files(self) -> dict[str, str]:
        """None: the keys are in the file."""
        return {}

    def check(self) -> None:
        """Refuses keys that are missing, or do not fit each other or the model."""
        _ = self.backend()

    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, a new one."""
        text = json.dumps(self.tokenizer_json)
        with tokenizer_faults(lambda error: f"{self.path}: tokenizer.ggml.merges: {error}; {_OTHERWISE}"):
            return tokenizers.Tokenizer.from_str(text)

    def _check_keys(self) -> None:
        tokens, types = self._required("tokens"), self._required("token_type")
        size = next((value for key, value in self.metadata.items() if key.endswith(".vocab_size")), len(tokens))
        if not len(tokens) == len(types) == size:
            raise UserError(
                f"{self.path}: tokenizer.ggml.tokens and token_type must have an entry for each of {size} rows of the "
                f"embedding, got {len(tokens)} and {len(types)}; {_OTHERWISE}"
            )
        if len({*tokens}) < len(tokens):
            raise UserError(f"{self.path}: tokenizer.ggml.tokens must differ from each other; {_OTHERWISE}")
        for role in ("bos", "eos", "eot", "eom", "padding"):
            id_ = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
            if id_ is not None and not 0 <= id_ < len(tokens):
                raise UserError(
                    f"{self.path}: tokenizer.ggml.{role}_token_id must be an id below {len(tokens)}, got {id_!r}; "
                    f"{_OTHERWISE}"
                )
        if self.metadata.get("tokenizer.ggml.add_eos_token"):
            raise UserError(
                f"{self.path}: tokenizer.ggml.add_eos_token must be false, as no text is trained with EOS before an "
                f"answer, got true; {_OTHERWISE}"
            )

    def unread_keys(self) -> list[str]:
        """Keys of the tokenizer that the files of Hugging Face have no place for."""
        return [key for key in self.metadata if key.startswith(_PREFIX) and key not in _READ]

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text."""
        return bool(self.metadata.get("tokenizer.ggml.add_bos_token"))

    @property
    def stop_ids(self) -> list[int]:
        """Every id at which generation stops."""
        stop = [self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        return list(dict.fromkeys(id_ for id_ in stop if id_ is not None))

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The ids of generation_config.json: bos_token_id, pad_token_id, and eos_token_id with every stop id."""
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.stop_ids or None,
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        return {name: value for name, value in ids.items() if value is not None}

    def gguf_metadata(self, roles: Roles | None = None) -> dict[str, object]:
        """The `tokenizer.*` keys as they are."""
        return {key: value for key, value in self.metadata.items() if key.startswith(_PREFIX)}

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into a folder."""
        write_json(folder / "tokenizer.json", self.tokenizer_json)
        write_json(folder / "tokenizer_config.json", self.tokenizer_config)

    @cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json: a byte-level BPE that puts BOS in front where the file says so."""
        self._check_keys()
        tokens, pre = self._required("tokens"), self._pre_tokenizer
        typed = [(token, id_, _type_of(token, kind)) for id_, (token, kind) in enumerate(self._typed)]
        added = [entry for entry in typed if entry[2] in (TokenType.CONTROL, TokenType.USER_DEFINED)]
        vocabulary = {token: id_ for token, id_, kind in typed if kind == TokenType.NORMAL}
        if [id_ for _, id_, _ in added] != list(range(len(vocabulary), len(vocabulary) + len(added))):
            vocabulary |= {token: id_ for token, id_, _ in added}  # not behind the others: here they get their ids
        return {
            "version": "1.0",
            "added_tokens": [_added_token(*token) for token in added],
            "pre_tokenizer": steps_of(pre),
            "post_processor": self._begin(tokens),
            "decoder": BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "ignore_merges": pre.ignore_merges,
                "vocab": vocabulary,
                "merges": [merge.split(" ") for merge in self._required("merges")],
            },
        }

    @property
    def _typed(self) -> Iterator[tuple[str, int]]:
        """Tokens and their types, in id order."""
        tokens, types = self._required("tokens"), self._required("token_type")
        if (model := self._required("model")) != "gpt2":
            raise UserError(
                f"{self.path}: tokenizer.ggml.model must be gpt2 (a byte-level BPE), got {model!r}; give --tokenizer a "
                "folder with tokenizer.json"
            )
        if unknown := {*types} - {*TokenType}:
            known = ", ".join(str(int(kind)) for kind in TokenType)
            raise UserError(
                f"{self.path}: tokenizer.ggml.token_type must be one of {known} for a byte-level BPE, got "
                f"{min(unknown)}; give --tokenizer a folder with tokenizer.json"
            )
        return zip(tokens, types, strict=True)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the names of the special tokens, and the chat template."""
        tokens = self._required("tokens")
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self._padding_id}
        template = self.metadata.get("tokenizer.chat_template")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": tokens[id_] for role, id_ in ids.items() if id_ is not None},
            "chat_template": self.renewed(template, END_OF_TURN in tokens) if isinstance(template, str) else None,
        }
        said = {key: value for key, value in config.items() if value is not None}
        return said if self.bos_id is not None else said | {"bos_token": None}

    @property
    def _padding_id(self) -> int | None:
        """None for a token that stands in texts, too: as a special one it would be cut out of them."""
        id_ = self.metadata.get("tokenizer.ggml.padding_token_id")
        special = id_ is not None and self._required("token_type")[id_] == TokenType.CONTROL
        return id_ if special else None

    def _required(self, key: str) -> Any:
        if (value := self.metadata.get(f"tokenizer.ggml.{key}")) is None:
            raise UserError(f"{self.path}: key tokenizer.ggml.{key} must be there, got none; export the model again")
        return value

    @property
    def _pre_tokenizer(self) -> PreTokenizer:
        name, known = self._required("pre"), {known.name: known for known in PRE_TOKENIZERS}
        if name not in known:
            raise UserError(f"{self.path}: tokenizer.ggml.pre must be one of {', '.join(known)}, got {name!r}")
        return known[name]

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


def _type_of(token: str, stored: int) -> int:
    """The type that runtimes go by; ids without a token stay unused."""
    if stored == TokenType.UNUSED:
        return stored
    if token in _USER_DEFINED_BY_NAME:
        return TokenType.USER_DEFINED
    return TokenType.CONTROL if token in _CONTROL_BY_NAME else stored


def _added_token(content: str, id_: int, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, **flags, "special": kind == TokenType.CONTROL}
