"""Tokenizers of every family, made with the library that defines them, and conversations to compare on.

byte-level BPE    gpt-2, llama-3 (BOS, a template of its own), qwen2 (no BOS, NFC)
SentencePiece     llama-2 (a space before every segment), mistral (before the first), gemma (none), all with bytes
                  for unknown characters; unigram (none of these)
WordPiece         words apart, lower case
"""

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitnet_train.data.conversation import Message
from tests.folders import LLAMA_3_SPLIT

TEXTS = [
    "Hello there, a list is red. What is it? It is a word: 1 + 1 = 2.",
    "the quick brown fox jumps over a lazy dog while seven wizards quietly mix bold potions",
    "user assistant system question answer tool model brief yes no",
] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 2's: BOS before every question, the answer between spaces; the system message within the first question.
LLAMA_2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ '[CLS] ' + m['role'] + ' ' + m['content'] + ' [SEP]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[CLS] assistant ' }}{% endif %}"
)

Chat = list[Message]


def chat(*turns: str) -> Chat:
    """Messages of "u: text", "a: text" and "s: text"."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(role=names[turn[0]], content=turn[3:]) for turn in turns]


CHATS = [
    chat("u: Hello there", "a: A list."),
    chat("u: Hi", "a: Größe 日本 🙂 ok"),
    chat("s: Be brief.", "u: What is it?", "a: No."),
    chat("u: a", "a: the word", "u: c  d", "a: e f\n\n g"),
    chat("s: x", "u: 1+1=2?", "a: Yes: 2.", "u: x=12345?", "a: def f(x):\n    return x"),
    chat("u: Tabs\t and\u00a0nbsp", "a: “quotes” — dash…"),
    chat("u: e\u0301 and \u00e9", "a: ﬁ and fi"),
    chat("u: <b>html</b> &amp;", "a: `code` **bold**"),
    chat("u: " + "long words " * 40, "a: short"),
    chat("u: the fox", "a: the dog", "u: and?", "a: the wizards", "u: and?", "a: potions"),
]


def _bytes(split: str | None = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = pre_tokenizers.Split(Regex(split or ""), behavior="isolated")
    backend.pre_tokenizer = to_bytes if split is None else pre_tokenizers.Sequence([cut, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _pieces(prefix: bool) -> tokenizers.Tokenizer:
    """SentencePiece's BPE as tokenizers converts it: spaces are U+2581, unknown characters tokens of bytes."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    )
    learnt = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    model = models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def _begin_with(backend: tokenizers.Tokenizer, bos: str) -> None:
    special = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)


def _gpt_2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _bytes()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return backend, {**roles, "chat_template": CHATML}


def _llama_3() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _bytes(LLAMA_3_SPLIT)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    _begin_with(backend, names[0])
    return backend, {"bos_token": names[0], "eos_token": names[1], "chat_template": LLAMA_3}


def _qwen2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _bytes(LLAMA_3_SPLIT.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return backend, {**roles, "tokenizer_class": "Qwen2Tokenizer", "chat_template": CHATML}


def _llama_2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _pieces(prefix=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _begin_with(backend, "<s>")
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA_2}


def _mistral() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _pieces(prefix=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    _begin_with(backend, "<s>")
    return backend, {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML}


def _gemma() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = _pieces(prefix=False)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    backend.add_tokens(["▁▁", "▁▁▁▁"])
    _begin_with(backend, "<s>")
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": GEMMA}


def _unigram() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted({*string.printable} - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend, {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML}


def _word_piece() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    roles = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    return backend, {**roles, "chat_template": WORDS}


FAMILIES: Mapping[str, Callable[[], tuple[tokenizers.Tokenizer, dict[str, Any]]]] = {
    "gpt-2": _gpt_2,
    "llama-3": _llama_3,
    "qwen2": _qwen2,
    "llama-2": _llama_2,
    "mistral": _mistral,
    "gemma": _gemma,
    "unigram": _unigram,
    "word-piece": _word_piece,
}


def write_family(folder: Path, family: str) -> Path:
    """tokenizer.json and tokenizer_config.json of a family, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend, config = FAMILIES[family]()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
