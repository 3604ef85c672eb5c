"""Text to token ids and back: byte-level BPE (LLaMA-3's, or one trained here), in the files that transformers reads.

    tokenizer.json           vocabulary, merges, split rule, special tokens
    tokenizer_config.json    which of them are BOS, EOS and padding, and the chat template

Text is data: `<|eot_id|>` typed in a document stays the characters that it is, and only callers who ask for it
(`parse_special`) turn the names of special tokens into control tokens. Nothing is added either: BOS and EOS belong to
whoever builds the sequence.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from bitnet_train.data.chat import BITNET_CHAT_TEMPLATE
from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"

# LLaMA-3's split (llama-models, llama3/tokenizer.py): contractions, words, up to three digits, signs, white space.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QUOTE = "\ufdd2"  # a code point that Unicode keeps out of text; see `quote`

# Threads in this process, none in its forks, whose copy of the thread pool is dead; and no warning about either.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens and its chat template.

    Args:
        backend: vocabulary and rules; truncation and padding are switched off.
        config: as in tokenizer_config.json. BOS and EOS are LLaMA-3's where it names none, padding is EOS, and the chat
            template BitNet's. Other keys are kept.

    Raises:
        UserError: BOS, EOS or padding is no token of the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, object] | None = None) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # their names in a text are text
        self._config = dict(config or {})
        self.bos_token = _token(self._config.get("bos_token")) or BOS
        self.eos_token = _token(self._config.get("eos_token")) or EOS
        self.pad_token = _token(self._config.get("pad_token")) or self.eos_token
        self.bos_token_id = self._id_of("bos_token", self.bos_token)
        self.eos_token_id = self._id_of("eos_token", self.eos_token)
        self.pad_token_id = self._id_of("pad_token", self.pad_token)
        self.eot_token_id: int | None = backend.token_to_id(EOT)
        self.chat_template = _template(self._config.get("chat_template")) or BITNET_CHAT_TEMPLATE
        backend.add_special_tokens([self.bos_token, self.eos_token, self.pad_token])  # as transformers does
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _id_of(self, role: str, token: str) -> int:
        id = self._backend.token_to_id(token)
        if id is None:
            raise UserError(f"tokenizer_config.json: {role} {token!r} is no token of tokenizer.json; name one that is")
        return int(id)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, tokenizer_config.json and chat_template.jinja; or a GGUF file.

        Raises:
            UserError: no tokenizer.json, or a file that cannot be read.
        """
        folder = Path(path)
        if folder.is_file():
            stored = GGUFTokenizer(folder, GGUFFile(folder).metadata)
            return cls(tokenizers.Tokenizer.from_str(json.dumps(stored.tokenizer_json)), stored.tokenizer_config)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json; name a folder that has one, as save_pretrained writes it")
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the only type that tokenizers raises
            raise UserError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from None
        return cls(backend, _read_config(folder))

    def save(self, folder: str | Path) -> None:
        """Writes both files, so that `from_folder` and transformers' AutoTokenizer read the same tokenizer back."""
        roles = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self._config
        config |= {**roles, "chat_template": self.chat_template}
        with atomic_file(Path(folder) / "tokenizer.json") as file:
            file.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        with atomic_file(Path(folder) / "tokenizer_config.json") as file:
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text, no BOS or EOS added.

        Args:
            parse_special: names of special tokens become their ids, but for those that `quote` has marked.
        """
        if not parse_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for index, part in enumerate(self._special_names.split(text)):
            if index % 2:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._encode_plain(part.replace(_QUOTE, ""))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def quote(self, text: str) -> str:
        """The text with a mark within every name of a special token, so that `parse_special` reads it as text."""
        return self._special_names.sub(lambda name: name[0][0] + _QUOTE + name[0][1:], text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; incomplete UTF-8 sequences become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, without special tokens; the pieces joined are what `decode` returns.

        A piece ends where a character does: one of several bytes may be spread over several ids.
        """
        pending: list[int] = []
        for id in ids:
            pending.append(id)
            piece = self.decode(pending, skip_special_tokens=True)
            if piece and not piece.endswith("\ufffd"):
                yield piece
                pending = []
        if pending:
            yield self.decode(pending, skip_special_tokens=True)

    def _encode_plain(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]  # unlike `encode` of the library, without offsets: less than half the time

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation: EOS, and the end of a turn where there is one."""
        ends = (self.eos_token_id, self.eot_token_id)
        return tuple(dict.fromkeys(id for id in ends if id is not None))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for; 0 for special tokens and for ids that are no token."""
        lengths = [0] * self.vocab_size
        for token, id in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[id] = len(token)  # byte-level: one character per byte
        for id, added in self._backend.get_added_tokens_decoder().items():
            lengths[id] = 0 if added.special else len(added.content.encode())
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides about ids: tokenizer.json, the special roles and the chat template."""
        parts = [self._backend.to_str(), self.bos_token, self.eos_token, self.pad_token, self.chat_template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def byte_level(backend: tokenizers.Tokenizer, special: Sequence[str]) -> Tokenizer:
    """Gives a BPE model of bytes LLaMA-3's split rule, special tokens after its own, and one BOS before a text.

    Args:
        backend: as `tokenizers.Tokenizer(models.BPE(...))` makes it, trained already.
        special: names in id order; BOS and EOS among them.
    """
    _split_to_bytes(backend)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    bos = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return Tokenizer(backend)


def _split_to_bytes(backend: tokenizers.Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with LLaMA-3's split rule, the same for the same texts in the same order.

    As in LLaMA-3 the special tokens have the last ids: BOS, EOS, <|eot_id|>, then reserved ones, which fill the
    vocabulary where the texts hold fewer pairs than were asked for.

    Args:
        vocab_size: tokens in all, special ones included; at least 259 (256 bytes, 3 special).

    Raises:
        UserError: vocab_size is too small.
    """
    special = [BOS, EOS, EOT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(f"vocab_size must be at least {len(alphabet) + len(special)}, got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    _split_to_bytes(backend)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer=trainer)
    reserved = vocab_size - len(special) - backend.get_vocab_size()
    special += [f"<|reserved_special_token_{index}|>" for index in range(reserved)]
    return byte_level(backend, special)


def _read_config(folder: Path) -> dict[str, object]:
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); write it anew or remove it") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(config).__name__}")
    config.pop("auto_map", None)  # names code to be run
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _token(entry: object) -> str | None:
    """The text of a special token, which may be stored as {"content": text, ...}."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None


def _template(entry: object) -> str | None:
    """The chat template; several are stored as [{"name": ..., "template": ...}], of which the default is taken."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, Mapping)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
