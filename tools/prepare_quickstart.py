"""The quickstart's data: real text that every machine with Python and ruff has, in seconds and without a download.

    python tools/prepare_quickstart.py [--out runs/quickstart/data] [--vocab-size 4096]

    pretrain/english.jsonl      the topics of Python's help(), a document each
    pretrain/docstrings.jsonl   the standard library's docstrings, a document per module
    pretrain/code.jsonl         modules of the standard library, 1 MB
    pretrain/heldout.jsonl      topics that share no eight words in a row with anything in the three files above
    sft/{train,heldout}.jsonl   asked what a rule of ruff checks, or why that is bad, the rule's page answers
    dpo/{train,heldout}.jsonl   asked what a rule checks, "What it does" is chosen over "Why is this bad?"
    code/{train,heldout}.jsonl  asked for code that passes a rule, the page's "Use instead" is chosen over its example
    tokenizer/                  byte-level BPE, trained on the training prose and conversations above
    summary.json                counts, bytes, tokens, and what xz -9 needs for the held-out text

Texts that share eight words in a row stand on the same side of every split, and SFT, DPO and code hold out the same
rules. The recipes do not use code/: tools/benchmark_quality.py does, because bad and good code differ in a few tokens.
All of it follows from the versions of Python and ruff and from the options; nothing is done where these are unchanged.
"""

import ast
import hashlib
import importlib.metadata
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

from bitnet_train.data.chat import encode_chat
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.formats.atomic import atomic_folder
from bitnet_train.options import integer

Texts = dict[str, str]  # name -> text

PASSAGE_WORDS = 8  # in a row, which texts on two sides of a split must not share
HELDOUT_TOPICS = 48_000  # bytes of English that are held out, at least
HELDOUT_PAGES = 45_000  # bytes of the rules' pages that are held out, about a tenth
CODE_BYTES = 1_000_000
MODULE_BYTES = 100_000  # longer modules are left out of the code
CONTEXT = 512  # tokens of a conversation, at most

# Not training text: tests, tables, wheels, what belongs to this machine, and the module that the topics come from.
SKIPPED = re.compile(
    r"(^|/)(tests?|idlelib|lib2to3|encodings|turtledemo|ensurepip|pydoc_data|site-packages|dist-packages)/"
    r"|_sysconfigdata|sitecustomize"
)

WHAT = (
    "What does the ruff rule `{name}` check?",
    "What does `{name}` look for?",
    "Explain what the rule `{name}` does.",
    "My linter reports `{name}`. What did it find?",
)
WHY = (
    "Why is it bad to break the ruff rule `{name}`?",
    "Why does `{name}` matter?",
    "Explain why the rule `{name}` exists.",
    "My linter reports `{name}`. Why should I care?",
)
CODE = (
    "Write code that passes the ruff rule `{name}`.",
    "Show me code that `{name}` accepts.",
    "What does code look like that follows the rule `{name}`?",
    "My linter reports `{name}`. What should the code be?",
)
_INSTEAD = re.compile(  # a block of code, "Use instead", and another block
    r"^```\w*[^\n]*\n((?:(?!```).)*?)^```\s+Use instead[^\n]*:\s+^```\w*[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Document:
    """A row of pretrain/."""

    name: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A row of sft/."""

    rule: str
    messages: list[Message]


@dataclass(frozen=True)
class Preference:
    """A row of dpo/ or code/."""

    rule: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Page:
    """What ruff says about one of its rules; `code` holds pairs of bad code and what to use instead."""

    rule: str
    what: str
    why: str
    code: tuple[tuple[str, str], ...]


Record = Document | Chat | Preference


def passages(text: str) -> set[tuple[str, ...]]:
    """All runs of eight words of a text, without case, punctuation and line breaks."""
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(PASSAGE_WORDS)), strict=False))


def families(texts: Texts) -> list[list[str]]:
    """Names in groups that share no passage with each other."""
    family = {name: [name] for name in texts}
    first: dict[tuple[str, ...], str] = {}
    for name, text in texts.items():
        for passage in passages(text):
            ours, theirs = family[name], family[first.setdefault(passage, name)]
            if ours is not theirs:
                theirs += ours
                family |= dict.fromkeys(ours, theirs)
    return list({id(names): names for names in family.values()}.values())


def hold_out(texts: Texts, enough: float) -> set[str]:
    """Names of whole families, the largest excepted, until they hold `enough` bytes; the order is that of a hash."""

    def size(names: Iterable[str]) -> int:
        return sum(len(texts[name].encode()) for name in names)

    groups = families(texts)
    groups.remove(max(groups, key=size))
    chosen: set[str] = set()
    for names in sorted(groups, key=lambda names: digest(min(names))):
        if size(chosen) < enough:
            chosen |= set(names)
    return chosen


def digest(text: str) -> str:
    """SHA-256, for choices that are the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def english() -> Texts:
    """The topics of Python's help(), without those that longer topics repeat for the most part."""
    kept: Texts = {}
    seen: set[tuple[str, ...]] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        here = passages(topics[name])
        if 2 * len(here & seen) <= len(here):
            kept[name] = topics[name].strip()
            seen |= here
    return kept


def library() -> Texts:
    """The standard library's modules: path -> source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files) if not SKIPPED.search(name)}


def docstrings(source: str) -> str:
    """A module's docstrings as Python's help() shows them: `name(arguments)`, then the indented text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        tree = ast.parse(source)
    return "\n\n".join([ast.get_docstring(tree) or "", *_documented(tree, "")]).strip()


def _documented(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        if text := ast.get_docstring(node):
            yield f"{prefix}{node.name}{arguments}\n\n" + re.sub("^(?=.)", "   ", text, flags=re.MULTILINE)
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{prefix}{node.name}.")


def sample_code(modules: Texts) -> Texts:
    """CODE_BYTES of modules, in the order of a hash."""
    kept: Texts = {}
    for name in sorted(modules, key=digest):
        if len(modules[name]) <= MODULE_BYTES and sum(map(len, kept.values())) < CODE_BYTES:
            kept[name] = modules[name]
    return kept


def pretraining() -> dict[str, Texts]:
    """Documents for english, docstrings, code and heldout; what shares a passage with heldout is in no other part."""
    prose, modules = english(), library()
    chosen = hold_out(prose, HELDOUT_TOPICS)
    heldout = {name: prose[name] for name in sorted(chosen)}
    held_passages = set().union(*map(passages, heldout.values()))
    parts = {
        "english": {name: text for name, text in prose.items() if name not in chosen},
        "docstrings": {name: docstrings(source) for name, source in modules.items()},
        "code": sample_code(modules),
    }
    for part, texts in parts.items():
        parts[part] = {name: text for name, text in texts.items() if text and held_passages.isdisjoint(passages(text))}
    return {**parts, "heldout": heldout}


def pages() -> list[Page]:
    """The pages of all rules that say both what the rule does and why that is bad."""
    command = [sys.executable, "-m", "ruff", "rule", "--all", "--output-format", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"`python -m ruff rule --all` failed ({result.stderr.strip()}); install ruff>=0.14")
    found = [_page(rule["name"], rule["explanation"]) for rule in json.loads(result.stdout)]
    return sorted((page for page in found if page.what and page.why), key=lambda page: page.rule)


def _page(rule: str, explanation: str) -> Page:
    parts = re.split(r"^## (.+)\n", explanation, flags=re.MULTILINE)
    sections = {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    code = tuple((bad.strip(), good.strip()) for bad, good in _INSTEAD.findall(explanation))
    return Page(rule, sections.get("What it does", ""), sections.get("Why is this bad?", ""), code)


def chats(page: Page) -> list[Chat]:
    """What the rule checks, and why that is bad."""
    return [
        Chat(page.rule, [_ask(WHAT, page), _answer(page.what)]),
        Chat(page.rule, [_ask(WHY, page), _answer(page.why)]),
    ]


def preference(page: Page) -> Preference:
    """Both answers are the page's; the question asks for the first."""
    return Preference(page.rule, [_ask(WHAT, page)], [_answer(page.what)], [_answer(page.why)])


def code_preferences(page: Page) -> list[Preference]:
    """The good code of every example over the bad."""
    return [
        Preference(page.rule, [_ask(CODE, page)], [_answer(good)], [_answer(bad)])
        for bad, good in page.code
        if bad != good
    ]


def _ask(questions: tuple[str, ...], page: Page) -> Message:
    choice = int(digest(questions[0] + page.rule), 16) % len(questions)
    return Message(role="user", content=questions[choice].format(name=page.rule))


def _answer(text: str) -> Message:
    return Message(role="assistant", content=text)


def encoded(record: Record, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a document, of a conversation, or of a prompt with either answer."""
    match record:
        case Document():
            return [tokenizer.encode(record.text)]
        case Chat():
            return [encode_chat(record.messages, tokenizer).input_ids]
        case Preference():
            answers = (record.chosen, record.rejected)
            return [encode_chat([*record.prompt, *answer], tokenizer).input_ids for answer in answers]


def build(folder: Path, vocab_size: int) -> dict[str, object]:
    """Writes everything but summary.json, and returns what that file is to say."""
    texts, rules = pretraining(), pages()
    held_rules = hold_out({page.rule: f"{page.what}\n{page.why}" for page in rules}, HELDOUT_PAGES)
    records: dict[str, list[Record]] = {
        f"pretrain/{part}": [Document(*item) for item in documents.items()] for part, documents in texts.items()
    }
    for side in ("train", "heldout"):
        here = [page for page in rules if (page.rule in held_rules) == (side == "heldout")]
        records[f"sft/{side}"] = [chat for page in here for chat in chats(page)]
        records[f"dpo/{side}"] = [preference(page) for page in here]
        records[f"code/{side}"] = [pair for page in here for pair in code_preferences(page)]
    records["code/train"] = without_passages_of(records["code/heldout"], records["code/train"])
    prose = [*texts["english"].values(), *texts["docstrings"].values()]
    said = [
        message["content"]
        for page in rules
        if page.rule not in held_rules
        for chat in chats(page)
        for message in chat.messages
    ]
    tokenizer = train_bpe([*prose, *said], vocab_size)
    tokenizer.save(folder / "tokenizer")
    files = {name: write(folder / f"{name}.jsonl", rows, tokenizer) for name, rows in records.items()}
    return {"files": files, "heldout_xz": xz_bits_per_byte(texts)}


def without_passages_of(heldout: Iterable[Record], records: list[Record]) -> list[Record]:
    """The pairs whose answers share no passage with held-out ones: rules repeat each other's examples."""
    held = set().union(*map(_answered, heldout))
    return [record for record in records if held.isdisjoint(_answered(record))]


def _answered(record: Record) -> set[tuple[str, ...]]:
    assert isinstance(record, Preference)
    return passages(record.chosen[0]["content"]) | passages(record.rejected[0]["content"])


def write(file: Path, records: list[Record], tokenizer: Tokenizer) -> dict[str, int]:
    """Writes documents, and those conversations that fit into the context; returns counts."""
    file.parent.mkdir(exist_ok=True)
    rows = tokens = 0
    with file.open("w", encoding="utf-8") as stream:
        for record in records:
            ids = encoded(record, tokenizer)
            if isinstance(record, Document) or max(map(len, ids)) <= CONTEXT:
                stream.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
                rows, tokens = rows + 1, tokens + sum(map(len, ids))
    return {"rows": rows, "too_long": len(records) - rows, "tokens": tokens, "file_bytes": file.stat().st_size}


def xz_bits_per_byte(texts: Mapping[str, Texts]) -> dict[str, float]:
    """What xz -9 needs for the held-out text alone, and after the training text, in which a copy would cost nothing."""
    joined = {part: "\n".join(documents.values()).encode() for part, documents in texts.items()}
    heldout = joined.pop("heldout")
    training = b"\n".join(reversed(joined.values()))  # the English last, where xz refers to it most cheaply
    with ThreadPoolExecutor() as threads:  # lzma works without the interpreter's lock
        alone, both, before = threads.map(xz_size, (heldout, training + b"\n" + heldout, training))
    return {
        "text_bytes": len(heldout),
        "bits_per_byte_alone": round(8 * alone / len(heldout), 4),
        "bits_per_byte_after_training_text": round(8 * (both - before) / len(heldout), 4),
    }


def xz_size(data: bytes) -> int:
    """Bytes of `xz -9`."""
    return len(lzma.compress(data, preset=9))


def version_key(vocab_size: int) -> dict[str, str]:
    """All that the data follow from."""
    return {
        "python": platform.python_version(),
        "ruff": importlib.metadata.version("ruff"),
        "tokenizers": importlib.metadata.version("tokenizers"),
        "script": digest(Path(__file__).read_text(encoding="utf-8")),
        "vocab_size": str(vocab_size),
    }


def is_current(out: Path, key: Mapping[str, str]) -> bool:
    """Whether `out` was made from this key. It is renamed into place whole: its summary vouches for the rest.

    Raises:
        UserError: `out` holds something else, which would be lost.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        return bool(json.loads((out / "summary.json").read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError):
        raise UserError(f"--out {out} holds files that this tool did not write; name another folder") from None


def main() -> None:
    """Reads the command line, and builds what is not there."""
    parser = ArgumentParser(description="Prepare the quickstart's data from Python's library and ruff's pages.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/data"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=integer(1, 1 << 24), default=4096, help="a multiple of 128 (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.vocab_size < 384 or arguments.vocab_size % 128:
        raise UserError(f"--vocab-size must be a multiple of 128 and at least 384, got {arguments.vocab_size}")
    key = version_key(arguments.vocab_size)
    if is_current(arguments.out, key):
        print(f"{arguments.out} is up to date")
        return
    with atomic_folder(arguments.out) as folder:
        summary = {"key": key, **build(folder, arguments.vocab_size)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_command(main)
