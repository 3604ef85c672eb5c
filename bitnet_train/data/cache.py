"""The token cache: sources are tokenized once, in parallel, and read through memory maps ever after.

    CACHE_DIR/tokens/KEY/      a sealed `store.TokenStore`
    KEY                        SHA-256 of the files' contents, the tokenizer with its template, the encoder's settings,
                               and the code that makes ids of rows

Names of files are no part of the key: a moved corpus is found again, a changed one is not. One process builds a store
while others that want it wait. One that is killed is gone on with, and ends with the same bytes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import islice
from pathlib import Path

import tokenizers

from bitnet_train.data import workers
from bitnet_train.data.digests import file_digest, fingerprint_of
from bitnet_train.data.encoding import Encoder
from bitnet_train.data.hub import hub_revision, is_hub_id
from bitnet_train.data.notices import say, say_once
from bitnet_train.data.paths import CACHE_TAG, expand, size_of
from bitnet_train.data.progress import BuildProgress
from bitnet_train.data.readers import format_of
from bitnet_train.data.saved import files_of
from bitnet_train.data.sources import BadRow, Row, scan_rows
from bitnet_train.data.store import Counts, StoreWriter, TokenStore, is_intact
from bitnet_train.errors import UserError
from bitnet_train.formats.file_lock import FileLock

BAD_ROWS = ("error", "skip")
_COMMIT_TOKENS = 1 << 24  # tokens between commits: what a kill can cost, some ten seconds of work
_WORTH_WORKERS = 1 << 22  # bytes of sources from which processes of their own pay
# modules that decide about ids
_CODE = (
    *("readers", "parts", "tables", "saved", "hub", "sources", "conversation", "preference"),
    *("sandbox", "template", "pieces", "chat", "tokenizer", "encoding", "store"),
)


def tokenized(
    paths: Sequence[str], encoder: Encoder, cache_dir: Path, num_proc: int | None = None, bad_rows: str = "error"
) -> TokenStore:
    """The sequences of all rows of the paths, from the cache or built now.

    Args:
        num_proc: processes that encode; None: one per core where the sources are large enough.
        bad_rows: "error", or "skip" to leave them out, count and report them.

    Raises:
        UserError: what `expand` and `scan_rows` raise, the error of the first bad row, or a cache that cannot be
            written.
    """
    files = expand(paths)
    memory = cache_dir / "digests"
    key = key_of(files, encoder, memory)
    folder = cache_dir / "tokens" / key[:32]
    if not is_intact(folder, key, memory):
        with locked(folder):
            if not is_intact(folder, key, memory):
                _build(files, encoder, StoreWriter(folder, key), num_proc or processes_for(files), bad_rows)
    store = TokenStore.open(folder)
    report(paths, store.counts, bad_rows)
    return store


def nth_row(paths: Sequence[str], number: int) -> str:
    """Where the row is that `TokenStore.rows` counts as `number`: file and line, as messages name it."""
    row = next(islice(scan_rows(expand(paths)), number, None))
    return row.where if isinstance(row, Row) else str(row.error)


def key_of(files: Sequence[str], encoder: Encoder, memory: Path) -> str:
    """What a store of the files answers to, see the module's text."""
    return fingerprint_of([content_of(files, encoder, memory), _code_version()])


def content_of(files: Sequence[str], encoder: Encoder, memory: Path) -> str:
    """The key but for the code: hash of the files' contents, of the tokenizer and of the encoder's settings."""
    contents = [_content(file, memory) for file in files]
    return fingerprint_of([contents, encoder.tokenizer.fingerprint, repr(encoder)])


def _content(file: str, memory: Path) -> str:
    """What a source holds, in one string."""
    if is_hub_id(file):
        return f"{file} {hub_revision(file)}"
    path = Path(file)
    try:
        if path.is_dir():
            return fingerprint_of([file_digest(part, memory) for part in files_of(path)])
        return f"{format_of(file)} {file_digest(path, memory)}"
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


@cache
def _code_version() -> str:
    """Hash of the modules that make ids of rows, and the version of the library that does."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for name in _CODE:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process builds what is going to be at the path."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tag(folder.parents[1])
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder.parent} cannot be written ({error.strerror}); name another folder"
        ) from None
    with lock:
        if not lock.take():
            say(f"waiting for another process that builds {folder}")
            lock.take(wait=True)
        yield


def _tag(cache_dir: Path) -> None:
    """Says to backups, and to `paths`, that everything here can be made again."""
    tag = cache_dir / CACHE_TAG
    if not tag.exists():
        tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n")


def processes_for(files: Sequence[str]) -> int:
    """One per core if the files are large enough."""
    return workers.available_cores() if _bytes(files) >= _WORTH_WORKERS else 1


def _bytes(files: Sequence[str]) -> int:
    """The size of the files; of the hub nothing is known, so much is expected."""
    sizes = (size_of(file) for file in files)
    return sum(_WORTH_WORKERS if size is None else size for size in sizes)


def _build(files: Sequence[str], encoder: Encoder, writer: StoreWriter, processes: int, bad_rows: str) -> None:
    committed = writer.counts.tokens
    with closing(writer), BuildProgress(files) as progress:
        rows = _without(writer.counts.rows, scan_rows(files, progress.read, encoder.cut))
        with closing(workers.encoded(encoder, rows, processes)) as chunks:
            for chunk in chunks:
                writer.append(chunk.ends, chunk.tokens, chunk.rows, chunk.counts)
                refuse(writer.counts, bad_rows)
                progress.show(writer.counts.tokens)
                if writer.is_whole and writer.counts.tokens - committed >= _COMMIT_TOKENS:
                    writer.commit()
                    committed = writer.counts.tokens
        writer.seal()


def _without(count: int, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows behind the first so many; parts of a row are one."""
    while count and (row := next(rows, None)) is not None:
        count -= row.ends
    return rows


def refuse(counts: Counts, rule: str) -> None:
    """Raises the error of the first bad row if the rule is "error"."""
    if counts.bad and rule == "error":
        raise UserError(f"{counts.bad_first[0]} (or leave such rows out: data.bad_rows=skip)")


def report(paths: Sequence[str], counts: Counts, bad_rows: str) -> None:
    """A line if fields or rows were left out, an error if rows may not be: a store knows no rule of its own."""
    refuse(counts, bad_rows)
    if counts.unread:
        say_once(f"{', '.join(paths)}: columns not read: {', '.join(counts.unread)}")
    if counts.bad:
        first = "; ".join(counts.bad_first)
        say(f"{', '.join(paths)}: {counts.bad} of {counts.rows} rows are bad and were skipped: {first}")
