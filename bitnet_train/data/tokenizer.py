"""Text to token ids and back, in the files that transformers reads, for tokenizers of every family.

    tokenizer.json           vocabulary, merges, split rule, special tokens
    tokenizer_config.json    which of them are BOS, EOS and padding, and the chat template

Text is data: `<|eot_id|>` typed in a document stays the characters that it is. Only in what a chat template wrote
(`encode_pieces`) are the names of special tokens control tokens. Nothing is added either: BOS and EOS belong to whoever
builds the sequence, and a tokenizer may have no BOS (Qwen2).

    family           a text begins with     the bytes of a character that is no token     examples
    byte-level BPE   nothing                tokens of bytes                               GPT-2, LLaMA-3, Qwen
    SentencePiece    often a space          byte tokens <0xNN>, or <unk>                  Llama 2, Mistral, Gemma
    WordPiece        nothing                <unk>; spaces are lost                        BERT
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

from bitnet_train.data.growth import check_growth
from bitnet_train.data.notices import say_once
from bitnet_train.data.parts import CONTEXT, PART_CHARACTERS, places
from bitnet_train.data.pieces import PieceEncoder, encoded, state_of
from bitnet_train.data.template import bitnet_template, closing_token, renewed
from bitnet_train.errors import UserError
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.tokenizer_faults import tokenizer_faults
from bitnet_train.formats.tokenizer_folder import read_config, read_stop_ids, templates_of, token_of

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"

# LLaMA-3's split (llama-models, llama3/tokenizer.py): contractions, words, up to three digits, signs, white space.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")

# Threads in this process, none in its forks, whose copy of the thread pool is dead; and no warning about either.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens and its chat templates.

    Args:
        backend: vocabulary and rules; truncation and padding are switched off.
        config: as in tokenizer_config.json. Where it names none, BOS is LLaMA-3's if that is a token, else there is
            none; EOS is LLaMA-3's, padding is EOS, and the chat template BitNet's. Other keys are kept.
        stop_token_ids: ids that end a generation, beside EOS and the token that closes an answer.

    Attributes:
        bos_token, bos_token_id: None where a text begins with nothing.
        chat_templates: by name; "default", and often "tool_use", which transformers takes for rows with tools.

    Raises:
        UserError: BOS, EOS or padding is no token of the vocabulary; several templates and none is the default; rules
            that make a text far longer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, object] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        check_growth(backend)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # their names in a text are text
        self._config = dict(config or {})
        self.bos_token = self._named("bos_token", BOS)
        eos_token = self._named("eos_token", EOS)
        if eos_token is None:
            raise UserError(
                f"tokenizer_config.json: eos_token names no token, and {EOS} is none of tokenizer.json; name the token "
                "that ends a text"
            )
        self.eos_token: str = eos_token
        self.pad_token = self._named("pad_token", None) or eos_token
        roles = [token for token in (self.bos_token, self.eos_token, self.pad_token) if token is not None]
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([token for token in roles if token not in special])  # as transformers does
        ids = {token: self._id_of(token) for token in roles}
        self.bos_token_id: int | None = None if self.bos_token is None else ids[self.bos_token]
        self.eos_token_id, self.pad_token_id = ids[self.eos_token], ids[self.pad_token]
        self.eot_token_id: int | None = backend.token_to_id(EOT)
        self._more_stop_ids = tuple(id for id in stop_token_ids if 0 <= id < 1 << 32 and backend.id_to_token(id))
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: id for id, token in added.items() if token.special}
        unknown = token_of(self._config.get("unk_token")) or getattr(backend.model, "unk_token", None)
        self._pieces = PieceEncoder(backend, self._special_ids, backend.token_to_id(unknown) if unknown else None)
        self._stops: tuple[str, tuple[tuple[int, ...], tuple[str, ...]]] | None = None
        self.chat_templates = self._templates()
        # For the fingerprint: BitNet's template has had two texts, and a run goes on that was begun with the first.
        given = self._config.get("chat_template")
        self._template_told = given if isinstance(given, str) else None

    def _named(self, role: str, usual: str | None) -> str | None:
        """The token of a role: by the config, which may say that there is none; else the usual one if it is a token."""
        token = token_of(self._config.get(role))
        if token is None:
            known = usual is not None and role not in self._config and self._backend.token_to_id(usual) is not None
            return usual if known else None
        if self._backend.token_to_id(token) is None:
            raise UserError(f"tokenizer_config.json: {role} {token!r} is no token of tokenizer.json; name one that is")
        return token

    def _id_of(self, token: str) -> int:
        id = self._backend.token_to_id(token)
        assert id is not None
        return id

    def _templates(self) -> dict[str, str]:
        """The config's, BitNet's where it has none. A template that is BitNet's but for BOS becomes BitNet's."""
        given = self._config.get("chat_template")
        if isinstance(given, list):
            templates = templates_of(self._config)
            if "default" not in templates:
                raise UserError(
                    f"tokenizer_config.json: chat_template must have one named default, got {', '.join(templates)}; "
                    "name the one for rows without tools"
                )
            return templates
        ends_turns = self.eot_token_id is not None
        return {"default": renewed(given, ends_turns) if isinstance(given, str) else bitnet_template(ends_turns)}

    @property
    def chat_template(self) -> str:
        """The template for rows without tools."""
        return self.chat_templates["default"]

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.chat_templates["default"], self._template_told = template, None

    def template_for(self, tools: object) -> str:
        """The template that transformers takes: tool_use where there are tools and such a template."""
        return self.chat_templates.get("tool_use" if tools else "default", self.chat_template)

    @cached_property
    def template_variables(self) -> dict[str, str]:
        """The names of special tokens, as transformers hands them to a template."""
        others = {role: token_of(entry) for role, entry in self._config.items() if role.endswith("_token")}
        roles = {**others, "bos_token": self.bos_token, "eos_token": self.eos_token}
        return {role: token for role, token in roles.items() if token is not None}

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they exist, the files beside it that say more; or a GGUF file.

        Raises:
            UserError: no tokenizer.json, or a file that cannot be read.
        """
        folder = Path(path)
        if folder.is_file():
            return cls.from_gguf(GGUFTokenizer(folder, GGUFFile(folder).metadata))
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json; name a folder that has one, as save_pretrained writes it")
        with tokenizer_faults(lambda error: f"{folder / 'tokenizer.json'}: not a tokenizer ({error})"):
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(backend, read_config(folder), read_stop_ids(folder))

    @classmethod
    def from_gguf(cls, stored: GGUFTokenizer) -> "Tokenizer":
        """The tokenizer among the keys of a GGUF file.

        Raises:
            UserError: a key is missing, or the tokenizer is none that is read here.
        """
        return cls(stored.backend(), stored.tokenizer_config, stored.stop_ids)

    def save(self, folder: str | Path) -> None:
        """Writes both files, so that `from_folder` and transformers' AutoTokenizer read the same tokenizer back."""
        roles = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        config = {"clean_up_tokenization_spaces": False} | self._config
        named = [{"name": name, "template": template} for name, template in self.chat_templates.items()]
        config |= {**roles, "chat_template": self.chat_template if len(named) == 1 else named}
        # The class that takes tokenizer.json as it is: Qwen2Tokenizer and others put rules of their own in its place.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        with atomic_file(Path(folder) / "tokenizer.json") as file:
            file.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        with atomic_file(Path(folder) / "tokenizer_config.json") as file:
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def begun(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text with BOS in front, where there is one."""
        return [*([] if self.bos_token_id is None else [self.bos_token_id]), *ids]

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first one of a text is predicted: BOS, or EOS, which ends the text before."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the names of special tokens in it are text."""
        return self.encode_batch([text])[0]  # unlike `encode` of the library, without offsets: less than half the time

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        """`encode` of each text, spread over the cores.

        Args:
            continued: each text is the rest of one.
        """
        if continued:
            return self._encode_rests(texts)
        if self.has_words_for_names:
            return [self.encode_pieces([self.quote(text)])[0] for text in texts]
        return encoded(self._backend, texts)

    def _encode_rests(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which no text begins: each is encoded behind a word or a line, whose ids are taken away."""
        befores = ["a" if text[:1].isspace() else "a\n" for text in texts]
        ids_of = {before: self.encode(before) for before in {*befores}}
        whole = self.encode_batch([before + text for before, text in zip(befores, texts, strict=True)])
        return [
            ids[len(first) :] if ids[: len(first)] == first else self.encode(text)
            for ids, first, text in zip(whole, map(ids_of.__getitem__, befores), texts, strict=True)
        ]

    def cut(self, window: str) -> int:
        """Where to cut a long text so that the ids of both parts are those of the whole, see `data.parts`.

        A place is tried on the characters around it. Blanks and line ends come first: few tokenizers reach over them.

        Args:
            window: the next `parts.WINDOW` characters.
        """
        for where in places(window):
            if self._may_part(window[where - CONTEXT : where], window[where : where + CONTEXT]):
                return where
        say_once(f"a text has no end of a word within {PART_CHARACTERS:,} characters: it is cut there, inside a word")
        return PART_CHARACTERS

    def _may_part(self, left: str, right: str) -> bool:
        try:
            whole, first = self.encode_batch([left + right, left])
            return whole == first + self.encode_batch([right], continued=True)[0]
        except UserError:  # it fails on this text, which is said when all of the part is encoded
            return False

    @property
    def has_words_for_names(self) -> bool:
        """Whether the model itself makes special tokens of their names, as Unigram does: they are words of it."""
        return self._pieces.has_words_for_names

    def quote(self, text: str) -> str:
        """The text with marks around every name of a special token, so that `encode_pieces` reads it as text."""
        return self._pieces.quote(text)

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of each of consecutive pieces of a text that a chat template wrote, see `data.pieces`."""
        return self._pieces.encode(pieces)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; incomplete UTF-8 sequences become U+FFFD."""
        with tokenizer_faults(
            lambda error: f"tokenizer.json: fails on ids ({error}); give a tokenizer that takes them"
        ):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, without special tokens; the pieces joined are what `decode` returns.

        A piece ends where a character does: one of several bytes may be spread over several ids. WordPiece, which moves
        spaces when more ids follow, gives its text at the end. Where tokens of bytes (<0xNN>) that are no UTF-8 follow
        some that are, `decode` makes U+FFFD of all of them, and the stream has given the first.
        """
        if isinstance(self._backend.decoder, decoders.WordPiece):
            yield self.decode(list(ids), skip_special_tokens=True)
        else:
            yield from filter(None, self._texts(ids, skip_special_tokens=True))

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """The text of each id within the others, special tokens included; a character stands with its last id."""
        *texts, rest = self._texts(ids, skip_special_tokens=False)
        return [*texts[:-1], texts[-1] + rest] if texts else []

    def _texts(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterator[str]:
        """The text that each id adds, empty while a character is not whole; at the end the rest."""
        # The last ids whose text was given: what follows them is no beginning, and keeps its space.
        given: list[int] = []
        pending: list[int] = []

        def added() -> str:
            before = self.decode(given, skip_special_tokens)
            return self.decode(given + pending, skip_special_tokens)[len(before) :]

        for id in ids:
            pending.append(id)
            text = added()
            if not text or text.endswith("\ufffd"):
                yield ""
                continue
            yield text
            given, pending = (pending if self.decode(pending, skip_special_tokens) else given + pending), []
        yield added()

    @property
    def special_tokens(self) -> list[str]:
        """The names of the special tokens: BOS and EOS, then the others in the order of their ids."""
        others = sorted(self._special_ids, key=self._special_ids.__getitem__)
        return list(dict.fromkeys(name for name in (self.bos_token, self.eos_token, *others) if name is not None))

    @property
    def special_token_ids(self) -> list[int]:
        """The ids of `special_tokens`."""
        return [self._id_of(name) for name in self.special_tokens]

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation: EOS, LLaMA-3's end of a turn, and what the template writes after an answer."""
        return self._stops_of(self.chat_template)[0]

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The names of `stop_token_ids`."""
        return self._stops_of(self.chat_template)[1]

    def _stops_of(self, template: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Ids and names, kept for the template that was asked for last: every row asks."""
        if self._stops is None or self._stops[0] != template:
            ids = self._find_stops()
            names = (self._backend.id_to_token(id) for id in ids)
            self._stops = template, (ids, tuple(name for name in names if name is not None))
        return self._stops[1]

    def _find_stops(self) -> tuple[int, ...]:
        closing = closing_token(self.chat_template, self._pieces.special_names, **self.template_variables)
        closing_id = None if closing is None else self._special_ids[closing]
        ends = (self.eos_token_id, self.eot_token_id, closing_id, *self._more_stop_ids)
        return tuple(dict.fromkeys(id for id in ends if id is not None))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for within a text; 0 for special tokens and for ids that are no token."""
        return self._byte_lengths[0]

    @property
    def first_byte_lengths(self) -> list[int]:
        """`byte_lengths` at the beginning of a text, where a token's space in front may have been added."""
        return self._byte_lengths[1]

    @cached_property
    def _byte_lengths(self) -> tuple[list[int], list[int]]:
        added = self._backend.get_added_tokens_decoder()
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        words = {token: id for token, id in vocabulary.items() if id not in added}
        within = [0] * self.vocab_size
        first = within.copy()
        asked = {token.content: id for id, token in added.items() if not token.special}
        if state_of(self._backend.decoder).count('"ByteLevel"'):
            for token, id in words.items():
                within[id] = first[id] = len(token)  # one character per byte
        else:
            asked |= words
        # the anchor is any token with letters: its text is taken away again
        anchor = [id for token, id in words.items() if token.isalpha()][:1]
        for lengths, before in ((within, anchor), (first, [])):
            size = len(self.decode(before).encode())
            texts = self._backend.decode_batch([[*before, id] for id in asked.values()], skip_special_tokens=False)
            for (token, id), text in zip(asked.items(), texts, strict=True):
                lengths[id] = 1 if _BYTE.fullmatch(token) else len(text.encode()) - size
        return within, first

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides about ids: tokenizer.json, the special roles and the chat templates."""
        several = self.chat_templates if len(self.chat_templates) > 1 else None
        template = several or self._template_told or self.chat_template
        parts: list[object] = [self._backend.to_str(), self.bos_token, self.eos_token, self.pad_token, template]
        words = {word for one in self.chat_templates.values() for word in re.findall(r"\w+", one)}
        used = {role: name for role, name in self.template_variables.items() if role in words}
        others = {role: name for role, name in used.items() if role not in ("bos_token", "eos_token", "pad_token")}
        usual = {id for id in (self.eos_token_id, self.eot_token_id) if id is not None}
        if others or usual != {*self.stop_token_ids}:
            parts += [others, self.stop_token_ids]
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
