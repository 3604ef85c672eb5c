"""Whether other programs make the ids of a prompt that training made.

    ours           as `encode_prompt`, of the tokenizer that was trained with
    transformers   apply_chat_template on the exported folder
    GGUF           the file's template, rendered here as llama-server does, tokenized by the runtime: a BOS that the
                   template wrote is taken away, and the runtime adds its own where the file says so

An earlier answer of a conversation was cut from its prompt in training; a program that sees the whole text may join
the two ("Assistant: " and "Hello" share a space). Such conversations are counted and not compared.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_train.data.chat import chat_pieces
from bitnet_train.data.conversation import Message
from bitnet_train.data.template import BITNET_CHAT_TEMPLATE, render
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export import llama_process
from bitnet_train.export.source import Source
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.hf_folder import GENERATION_CONFIG, write_json

Prompts = Sequence[list[Message]]
# Of prompts, and of ids that end our generation: the runtime's ids of each prompt, and ids at which it stops.
Ask = Callable[[Prompts, Sequence[int]], tuple[list[list[int]], Sequence[int]]]

_TEXTS = (  # letters of several scripts, composed and not; digits, code, spaces, signs
    *("Hi", "What does the rule unused-import check?", "12 + 3 = 15, 1234567890", "I'll say it's DON'T"),
    *("def f(x):\n    return x\n\n\nprint(f(1))", "a  b   c\td", "Größe, naïve, e\u0301 and \u00e9", "日本の首都は?"),
    *("Москва — столица", "😀👍🏽 ok", "x<y && y>z || a!=b", '{"key": [1, 2.5, null]}'),
)


@dataclass(frozen=True)
class PromptCheck:
    """How many prompts have the same ids in a runtime, and whether it stops at the same ids.

    Attributes:
        compared, equal: prompts.
        cut: conversations that training cuts where others do not, not compared.
        first: the first prompt that differs.
        stops: ids at which our generation ends and the runtime's does not.
    """

    compared: int
    equal: int
    cut: int = 0
    first: str = ""
    stops: tuple[int, ...] = ()

    @property
    def agrees(self) -> bool:
        """Nothing differs."""
        return self.equal == self.compared and not self.stops

    def __str__(self) -> str:
        cut = f" ({self.cut} with earlier answers are cut in training alone)" if self.cut else ""
        first = f", first {self.first}" if self.first else ""
        stops = f"does not stop at {', '.join(map(str, self.stops))}" if self.stops else "stop ids equal"
        return f"prompts {self.equal} of {self.compared} equal{cut}{first}; {stops}"


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer of a model that is exported.

    Raises:
        UserError: it has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        source.tokenizer.write(Path(folder))
        write_json(Path(folder) / GENERATION_CONFIG, source.generation_config)
        return Tokenizer.from_folder(folder)


def conversations() -> Iterator[list[Message]]:
    """Conversations that end with a user's message."""
    system = Message(role="system", content="Be brief. Größe!")
    answer = Message(role="assistant", content="Yes, 1.")
    for text in _TEXTS:
        user = Message(role="user", content=text)
        yield from ([user], [system, user], [user, answer, user])


def check_prompts(tokenizer: Tokenizer, ask: Ask) -> PromptCheck:
    """Compares a runtime's ids and stops with those of the tokenizer that was trained with."""
    compared, expected, cut = [], [], 0
    for messages in conversations():
        try:
            pieces = chat_pieces(messages, tokenizer, add_generation_prompt=True)
        except UserError:  # templates may refuse system messages
            continue
        ids = [id for piece in tokenizer.encode_pieces(pieces) for id in piece]
        if tokenizer.encode_pieces(["".join(pieces)]) == [ids]:
            compared.append(messages)
            expected.append(ids)
        else:
            cut += 1
    found, stops = ask(compared, tokenizer.stop_token_ids)
    differing = [
        f"{messages[-1]['content']!r}: {theirs}, ours {ours}"
        for messages, theirs, ours in zip(compared, found, expected, strict=True)
        if theirs != ours
    ]
    unstopped = tuple(sorted({*tokenizer.stop_token_ids} - {*stops}))
    return PromptCheck(len(compared), len(compared) - len(differing), cut, "".join(differing[:1]), unstopped)


def check_folder(tokenizer: Tokenizer, folder: Path) -> PromptCheck:
    """transformers' ids, of an exported folder.

    Raises:
        RuntimeFailure: transformers cannot read the tokenizer or run its template.
    """
    transformers = importlib.import_module("transformers")

    def ask(prompts: Prompts, stops: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        how = {"add_generation_prompt": True, "return_dict": True}
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            given = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
            ids = [list(theirs.apply_chat_template(prompt, **how)["input_ids"]) for prompt in prompts]
        except Exception as error:  # anything: a template is foreign code there, too
            raise llama_process.RuntimeFailure(f"{type(error).__name__}: {error}") from None
        return ids, given if isinstance(given, list) else [given]

    return check_prompts(tokenizer, ask)


def check_gguf(tokenizer: Tokenizer, file: Path, package: str) -> PromptCheck:
    """The ids of llama.cpp or ik_llama.cpp, of an exported file.

    Raises:
        RuntimeFailure: the runtime cannot load the file.
    """
    stored = GGUFTokenizer(file, GGUFFile(file).metadata)
    config = stored.tokenizer_config

    def ask(prompts: Prompts, stops: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        names = {role: name for role, name in config.items() if role.endswith("_token") and name is not None}
        template = config.get("chat_template", BITNET_CHAT_TEMPLATE)
        texts = [render(prompt, template, True, **names).text for prompt in prompts]
        if stored.begins_with_bos:
            texts = [text.removeprefix(names["bos_token"]) for text in texts]
        answer = llama_process.ask(package, file, stops[:1], texts, special=True, add_bos=True, stops=stops)
        return answer.ids, answer.stops

    return check_prompts(tokenizer, ask)
