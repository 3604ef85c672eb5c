"""The tokenizer of a model folder: which ids begin and stop a text, what travels with it, what GGUF wants to know.

tokenizer.json (Hugging Face tokenizers) holds a byte-level BPE: vocabulary, merges, added tokens, and the regular
expression that cuts a text before merging. GGUF keeps the same facts under `tokenizer.ggml.*`; of the expression only a
name, see `pre_tokenizers`; of steps beside it nothing: normalizers, spaces that an added token swallows.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import GENERATION_CONFIG
from bitnet_train.formats.json_file import read_json, write_json
from bitnet_train.formats.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, cuts_of
from bitnet_train.formats.private_paths import without_paths
from bitnet_train.formats.schemas import GenerationConfig, TokenizerConfig, TokenizerJson
from bitnet_train.formats.tokenizer_faults import tokenizer_faults
from bitnet_train.formats.tokenizer_folder import read_config, templates_of, token_of

BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"  # LLaMA-3's names
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
_ROLES = "special_tokens_map.json"
OTHER_FILES = (  # read by transformers where there is no tokenizer.json
    *(_ROLES, "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),
)

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
STOPS_BY_NAME = (  # where runtimes stop, whatever the keys say
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "_<EOT>", "<|eom_id|>"),
    *("<|end_of_text|>", "<|return|>", "<|call|>", "<end_of_utterance>"),
)
_STRIPS = ("lstrip", "rstrip", "single_word")  # of an added token: GGUF has no place for them


class TokenType(IntEnum):
    """The numbers of `tokenizer.ggml.token_type` (llama.cpp, enum llama_token_type)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


class Roles(NamedTuple):
    """The id that begins a text, if there is one, and the ids that end a generation, EOS first."""

    bos: int | None
    stops: Sequence[int]


def unchanged(template: str, ends_turns: bool) -> str:
    """The template as it is."""
    return template


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a folder, with the config.json of its model.

    Attributes:
        folder: where they are.
        config: of the model.
        renewed: what a chat template of the folder is written as, given whether <|eot_id|> is a token: an older text of
            BitNet's becomes today's.

    Raises (every method):
        UserError: a file is missing or damaged, or the tokenizer does not fit the model or GGUF.
    """

    folder: Path
    config: Mapping[str, Any]
    renewed: Callable[[str, bool], str] = unchanged

    @property
    def path(self) -> Path:
        """tokenizer.json."""
        return self.folder / TOKENIZER

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return read_json(self.path, TokenizerJson)

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """The library's reading of tokenizer.json: it gives ids of its own to added tokens out of their place."""
        self._tokenizer  # noqa: B018  (for its message, where the file is no JSON)
        with tokenizer_faults(lambda error: f"{self.path}: not a tokenizer ({error})"):
            return tokenizers.Tokenizer.from_file(str(self.path))

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._backend.get_added_tokens_decoder()

    @cached_property
    def _roles(self) -> dict[str, Any]:
        """The content of tokenizer_config.json and of the files beside it."""
        return read_config(self.folder)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token, added ones included; empty where the folder has no tokenizer.json."""
        return self._backend.get_vocab(with_added_tokens=True) if self.path.is_file() else {}

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
        given = read_json(path, GenerationConfig).get("eos_token_id") if path.is_file() else None
        listed = given if isinstance(given, list) else [given]
        more = [id_ for id_ in listed if type(id_) is int and 0 <= id_ < self.config["vocab_size"]]
        turn = [self.ids[END_OF_TURN]] if END_OF_TURN in self.ids else []
        return list(dict.fromkeys([*self._special("eos", END_OF_TEXT), *more, *turn]))

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text: a prompt that the chat template makes has it if that writes it.

        llama.cpp takes BOS away from such a prompt before it adds its own.
        """
        if self.bos_id is None or self._roles.get("add_bos_token") is False:
            return False
        return self.chat_template is None or "bos_token" in _COMMENT.sub("", self.chat_template)

    @cached_property
    def chat_template(self) -> str | None:
        """The template, renewed: the one for rows without tools where there are several."""
        template = templates_of(self._roles).get("default")
        return None if template is None else self._renewed(template)

    def _renewed(self, template: str) -> str:
        return self.renewed(template, END_OF_TURN in self.ids)

    def check(self) -> None:
        """Refuses a tokenizer whose ids have no row in the embedding."""
        size, largest = self.config["vocab_size"], max(self.ids.values(), default=-1)
        if largest >= size:
            raise UserError(f"{self.path}: every id must be below the model's vocab_size ({size}), got {largest}")

    def files(self) -> dict[str, str]:
        """The files that `write` takes from the folder, and the state in which they go."""
        read = [TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE]
        unread = "copied unread" if not self.path.is_file() else "copied"
        states = dict.fromkeys(read, "copied") | dict.fromkeys(OTHER_FILES, unread)
        found = {name: state for name, state in states.items() if (self.folder / name).is_file()}
        more = sorted((self.folder / MORE_TEMPLATES).glob("*.jinja"))
        return found | {f"{MORE_TEMPLATES}/{file.name}": "copied" for file in more}

    def write(self, folder: Path) -> None:
        """Copies the files into a folder, the paths of machines left out, see `private_paths`."""
        for name in self.files():
            source, target = self.folder / name, folder / name
            target.parent.mkdir(exist_ok=True)
            if name == CHAT_TEMPLATE and self.chat_template is not None:
                target.write_text(self.chat_template, encoding="utf-8")
            elif name in (TOKENIZER_CONFIG, _ROLES):
                self._write_public(source, target)
            else:
                shutil.copyfile(source, target)

    def _write_public(self, source: Path, target: Path) -> None:
        stored = read_json(source, TokenizerConfig)
        public = without_paths(stored)
        if isinstance(template := public.get("chat_template"), str):
            public["chat_template"] = self._renewed(template)
        if public == stored:
            shutil.copyfile(source, target)
        else:
            write_json(target, public)

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The ids of generation_config.json: bos_token_id, and eos_token_id with every stop id."""
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.stop_ids or None, "pad_token_id": self._pad_id}
        return {name: value for name, value in ids.items() if value is not None}

    def gguf_metadata(self, roles: Roles | None = None) -> dict[str, object]:
        """The `tokenizer.*` keys of a GGUF file, with as many tokens as the model's vocab_size.

        Args:
            roles: the tokenizer's, by which config.json may be overruled: of several ids that end a text there, a
                tokenizer has one for EOS. Default: those of the files.
        """
        bos, stops = roles or Roles(self.bos_id, self.stop_ids)
        eos = next(iter(stops), None)
        keys = self._gguf_metadata | {
            "tokenizer.ggml.bos_token_id": bos,
            "tokenizer.ggml.eos_token_id": eos,
            "tokenizer.ggml.padding_token_id": eos if self._pad_id is None else self._pad_id,
            "tokenizer.ggml.add_bos_token": bos is not None and self.begins_with_bos,
            **self._stop_keys(stops[1:]),
        }
        return {key: value for key, value in keys.items() if value is not None}

    @cached_property
    def _gguf_metadata(self) -> dict[str, object]:
        """The keys that hold no id."""
        if not self.path.is_file():
            raise UserError(f"{self.path}: must be there for GGUF, found none; give --tokenizer a folder that has it")
        for reason in self._unsayable():
            raise UserError(f"{self.path}: {reason}; use --format safetensors")
        pre, (tokens, types) = self._pre_tokenizer(), self._tokens()
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": self._merges(),
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.chat_template": self.chat_template and _without_generation(self.chat_template),
        }

    def _stop_keys(self, others: Sequence[int]) -> dict[str, object]:
        """The keys of the ids that end a generation beside EOS: the end of a turn, and of a message within one."""
        others = sorted(others, key=lambda id_: id_ != self.ids.get(END_OF_TURN))
        names = {id_: name for name, id_ in self.ids.items()}
        unsaid = [id_ for id_ in others[len(_STOP_KEYS) :] if names.get(id_) not in STOPS_BY_NAME]
        if unsaid:
            raise UserError(
                f"{self.folder}: at most {1 + len(_STOP_KEYS)} ids may end a generation for GGUF, which has keys for "
                f"no more, got {len(others) + 1}, {unsaid[0]} among them; use --format safetensors"
            )
        return dict(zip(_STOP_KEYS, others, strict=False))

    @property
    def _pad_id(self) -> int | None:
        return next(iter(self._special("pad", None)), None)

    def _special(self, role: str, usual: str | None) -> list[int]:
        """The ids of a role: by config.json, else by tokenizer_config.json, else by the usual token's name."""
        given = self.config.get(f"{role}_token_id")
        if given is not None:
            return [self._checked(id_, role) for id_ in (given if isinstance(given, list) else [given])]
        return self._named(role, usual)

    def _named(self, role: str, usual: str | None) -> list[int]:
        """The id of the token that tokenizer_config.json names for a role, or of the usual one; none for no token."""
        name = token_of(self._roles.get(f"{role}_token", usual))
        return [self.ids[name]] if name in self.ids else []

    def _checked(self, id_: object, role: str) -> int:
        size = self.config["vocab_size"]
        if type(id_) is not int or not 0 <= id_ < size:
            raise UserError(
                f"{self.folder}/config.json: {role}_token_id must be an id below vocab_size ({size}), got {id_!r}"
            )
        return id_

    def _unsayable(self) -> Iterator[str]:
        """Reasons why GGUF has no keys for this tokenizer."""
        model = self._tokenizer.get("model", {})
        if model.get("type") != "BPE":
            yield f"model.type must be BPE for GGUF, got {model.get('type')!r}"
        normalizer = self._tokenizer.get("normalizer")
        if normalizer and normalizer.get("normalizers") != []:
            yield f"normalizer must be null for GGUF, which keeps none, got {normalizer}"
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                yield f"model.{field} must be empty for GGUF, which has no place for it, got {model[field]!r}"
        for token in self._added.values():
            for flag in _STRIPS:
                if getattr(token, flag):
                    told = f"added token {token.content!r}: {flag}"
                    yield f"{told} must be false for GGUF, which has no key for it, got true"

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Tokens and types in id order; ids that the tokenizer does not use become `[PAD<id>]`."""
        self.check()
        missing = sorted({*tokenizers.pre_tokenizers.ByteLevel.alphabet()} - self.ids.keys())
        if missing and self._tokenizer["model"].get("unk_token"):
            raise UserError(
                f"{self.path}: every byte must be a token for GGUF, which has no unknown token beside them, got none "
                f"for {missing[0]!r}; use --format safetensors"
            )
        size = self.config["vocab_size"]
        tokens = [f"[PAD{id_}]" for id_ in range(size)]
        types, normal = [int(TokenType.UNUSED)] * size, int(TokenType.NORMAL)
        for token, id_ in self.ids.items():
            tokens[id_], types[id_] = token, normal
        for id_, added in self._added.items():
            types[id_] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        for role, usual in (("bos", BEGIN_OF_TEXT), ("eos", END_OF_TEXT), ("pad", None)):
            for id_ in self._named(role, usual):  # special by its role, as transformers has it
                types[id_] = int(TokenType.CONTROL)
        if any("\0" in token for token in tokens):  # runtimes read up to it
            raise UserError(f"{self.path}: no token may hold a NUL byte for GGUF, got one; use --format safetensors")
        if len({*tokens}) < size or "" in tokens:  # runtimes end with an assertion
            bad = next(token for token, count in Counter(tokens).items() if count > 1 or not token)
            raise UserError(f"{self.path}: every token must be there once and not be empty for GGUF, got {bad!r}")
        return tokens, types

    def _merges(self) -> list[str]:
        """The merges, each as "left right"."""
        merges = self._tokenizer["model"].get("merges")
        if not merges:
            raise UserError(f"{self.path}: model.merges must not be empty for GGUF, got {merges!r}")
        written = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        if bad := next((merge for merge in written if merge.count(" ") != 1), None):
            raise UserError(f"{self.path}: model.merges must join tokens without spaces for GGUF, got {bad!r}")
        return written

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name of how a text is cut before merging."""
        pre = self._tokenizer.get("pre_tokenizer") or {}
        cuts, ignores = cuts_of(pre), bool(self._tokenizer["model"].get("ignore_merges"))
        known = [known for known in PRE_TOKENIZERS if known.cuts == cuts]
        if not known:
            names = ", ".join(dict.fromkeys(known.name for known in PRE_TOKENIZERS))
            raise UserError(
                f"{self.path}: pre_tokenizer must be one that GGUF has a name for ({names}), got {pre}; use --format "
                "safetensors"
            )
        return self._chosen(known, ignores).name

    def _chosen(self, known: list[PreTokenizer], ignores: bool) -> PreTokenizer:
        """The name with the tokenizer's ignore_merges; the first of all where that makes no difference."""
        if known[0].ignore_merges == ignores or self._merges_make_every_token:
            return known[0]
        for candidate in known:
            if candidate.ignore_merges == ignores:
                return candidate
        raise UserError(
            f"{self.path}: model.ignore_merges must be {known[0].ignore_merges} for GGUF with this pre_tokenizer, got "
            f"{ignores}; use --format safetensors"
        )

    @cached_property
    def _merges_make_every_token(self) -> bool:
        """Whether merging the bytes of each token gives that token: ignore_merges then changes nothing."""
        model = self._tokenizer["model"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        words = (token for token, id_ in model["vocab"].items() if id_ not in self._added)
        with tokenizer_faults(lambda error: f"{self.path}: model.merges: {error}; mend the file"):
            merging = tokenizers.models.BPE(vocab=model["vocab"], merges=merges)
            return all(len(merging.tokenize(word)) == 1 for word in words)


def _without_generation(template: str) -> str:
    """The template with {% if true %} for {% generation %}: the same text, and no tag that llama.cpp's parsers lack."""
    return _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)
