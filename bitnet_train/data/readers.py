"""What one file holds, as a stream of (number, fields): five formats, three compressions, nothing else in memory.

    .txt            1, {"text": the whole file}
    .jsonl .json    line number, the object on the line (blank lines are skipped)
    .parquet .arrow row number, the row

each also as .gz, .xz or .zst. `pyarrow`, which comes with `datasets`, is imported when a file needs it.

Reading can begin at the place behind any row. Lines are reached by their byte, rows of a .parquet by their row group,
rows of an .arrow file by passing over those before; in a compressed file all before is decompressed.
"""

import codecs
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitnet_train.data.tables import Convert, converters
from bitnet_train.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from _typeshed import WriteableBuffer as Buffer

Fields = dict[str, object]


class Place(NamedTuple):
    """Where in a file reading can begin: behind so many bytes (decompressed; 0 in tables) and so many lines or rows."""

    offset: int = 0
    number: int = 0


START = Place()
_ARROW_ERRORS = (KeyError, NotImplementedError, MemoryError)  # what pyarrow raises beside OSError and ValueError
# Each row with the place behind it; numbers count lines or rows from 1. What is wrong with a row stands in its place.
Placed = Iterator[tuple[Place, Fields | UserError]]

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_TYPE_NAMES = {"NoneType": "null", "str": "a string", "dict": "an object", "list": "a list", "bool": "true or false"}
ROWS_AT_ONCE = 1024  # rows of a parquet file that are in memory together
_ROWS_AS_OBJECTS = 64  # of these, rows that are Python objects together
_SKIPPED_AT_ONCE = 1 << 20  # bytes


def read_from(file: str, start: Place, on_read: Callable[[int], object] = int) -> Placed:
    """Streams the rows of a file of a known format from a place on, each with the place behind it.

    A line that is no JSON object with each name once, or a row that is no UTF-8, gives its UserError instead of fields.

    Args:
        start: `START`, or a place that an earlier call gave.
        on_read: is told how many bytes of the file were read, each time.

    Raises:
        UserError: an unknown format, a damaged file.
    """
    read, decompressed = _READERS[format_of(file)], _DECOMPRESSORS[_suffixes(file)[1]]
    try:
        with _open(file, on_read) as raw, decompressed(raw) as stream:
            yield from read(stream, start)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, *_ARROW_ERRORS) as error:
        raise UserError(f"{file}: cannot be read, it may be damaged ({error})") from None


def format_of(file: str) -> str:
    """The format's suffix, as .jsonl for a/b.jsonl.gz. Raises UserError where it is unknown."""
    if not is_readable(file):
        raise UserError(f"{file}: unknown format {_suffixes(file)[0]!r}; {FORMATS} are read")
    return _suffixes(file)[0]


def is_readable(file: str) -> bool:
    """Whether the name ends as one of a known format."""
    return _suffixes(file)[0] in _READERS


def type_name(value: object) -> str:
    """The type of a JSON value in words, for messages."""
    name = type(value).__name__
    return _TYPE_NAMES.get(name, name)


def _suffixes(file: str) -> tuple[str, str]:
    """Format and compression: a/b.jsonl.gz -> (.jsonl, .gz); either may be empty."""
    path = Path(file)
    compression = path.suffix.lower() if path.suffix.lower() in _DECOMPRESSORS else ""
    return Path(path.stem if compression else path.name).suffix.lower(), compression


def _read_text(stream: io.BufferedIOBase, start: Place) -> Placed:
    data = b"" if start.number else stream.read()
    if data.strip():
        yield Place(len(data), 1), _or_error(_text_document, data)


def _text_document(data: bytes) -> Fields:
    return {"text": _decode(data)}


def _read_json_lines(stream: io.BufferedIOBase, start: Place) -> Placed:
    _skip(stream, start.offset)
    offset = start.offset
    for number, line in enumerate(stream, start=start.number + 1):
        offset += len(line)
        if line.strip():
            yield Place(offset, number), _or_error(_json_object, line)


def _skip(stream: io.BufferedIOBase, count: int) -> None:
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (passed := stream.read(min(count, _SKIPPED_AT_ONCE))):
        count -= len(passed)


def _or_error(parse: Callable[[bytes], Fields], data: bytes) -> Fields | UserError:
    try:
        return parse(data)
    except UserError as error:
        return error


def _json_object(line: bytes) -> Fields:
    text = _decode(line)
    hint = "; a JSON array becomes lines with: jq -c '.[]'" if text.startswith("[") else ""
    try:
        value: object = json.loads(text, object_pairs_hook=_unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is no JSON ({error}); write one object per line{hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"the line is {type_name(value)}; write one object per line{hint}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the line has {twice!r} twice in one object; keep one of them")
    return fields


def _decode(data: bytes) -> str:
    if data.startswith(_UTF16):
        raise UserError("the byte order mark says UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, position = data[error.start], error.start
        raise UserError(f"byte 0x{byte:02x} at {position} is not UTF-8; convert the file with iconv") from None


def _read_parquet(stream: io.BufferedIOBase, start: Place) -> Placed:
    from pyarrow import parquet

    with _seekable(stream) as seekable:
        file = parquet.ParquetFile(seekable)
        groups = range(file.num_row_groups)
        ends = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
        group = bisect_right(ends, start.number) - 1
        if group < len(groups):
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups[group:])
            yield from rows_of(batches, ends[group], start.number)


def _read_arrow(stream: io.BufferedIOBase, start: Place) -> Placed:
    """Both containers: the stream that `datasets` writes, and the file (Feather 2), which begins with ARROW1."""
    from pyarrow import ipc

    with _seekable(stream) as seekable:
        is_file = seekable.read(6) == b"ARROW1"
        seekable.seek(0)
        reader = ipc.open_file(seekable) if is_file else ipc.open_stream(seekable)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from rows_of(batches, 0, start.number)


def rows_of(batches: Iterable["pyarrow.RecordBatch"], number: int, start: int) -> Placed:
    """The rows from number `start` on, counted from 0; the first batch begins with row `number`.

    Offsets and lengths in a file are taken on trust by Arrow, which would read beyond the file: they are checked first.
    """
    for batch in batches:
        batch.validate(full=True)
        changes = converters(batch.schema)
        for first in range(max(start - number, 0), batch.num_rows, _ROWS_AS_OBJECTS):
            rows = batch.slice(first, _ROWS_AS_OBJECTS).to_pylist()
            yield from ((Place(0, number + first + i), _converted(row, changes)) for i, row in enumerate(rows, start=1))
        number += batch.num_rows


def _converted(row: Fields, changes: Mapping[str, Convert]) -> Fields | UserError:
    try:
        return row | {name: change(row[name]) for name, change in changes.items()} if changes else row
    except UserError as error:
        return error


@contextmanager
def _seekable(stream: io.BufferedIOBase) -> Iterator[io.BufferedIOBase]:
    """The stream itself if it is a plain file, else what it decompresses to, in a temporary file."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


class _MeteredFile(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, file: str, on_read: Callable[[int], object]) -> None:
        super().__init__(file)
        self._on_read = on_read

    def readinto(self, buffer: "Buffer", /) -> int | None:
        """Fills the buffer."""
        count = super().readinto(buffer)
        self._on_read(count or 0)
        return count


def _open(file: str, on_read: Callable[[int], object]) -> io.BufferedReader:
    return io.BufferedReader(_MeteredFile(file, on_read))


def _plain(raw: io.BufferedReader) -> io.BufferedIOBase:
    return raw


def _gzip(raw: io.BufferedReader) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=raw)


def _xz(raw: io.BufferedReader) -> io.BufferedIOBase:
    return lzma.LZMAFile(raw)


def _zstd(raw: io.BufferedReader) -> io.BufferedIOBase:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


_DECOMPRESSORS: Mapping[str, Callable[[io.BufferedReader], io.BufferedIOBase]] = {
    "": _plain,
    ".gz": _gzip,
    ".xz": _xz,
    ".zst": _zstd,
}
_READERS: Mapping[str, Callable[[io.BufferedIOBase, Place], Placed]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FORMATS = f"{' '.join(_READERS)} (also with .gz .xz .zst)"  # as messages name them
