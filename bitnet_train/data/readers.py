"""What one file holds, as a stream of (number, fields): five formats, three compressions, nothing else in memory.

    .txt            1, {"text": the whole file}
    .jsonl .json    line number, the object on the line (blank lines are skipped)
    .parquet .arrow row number, the row

each also as .gz, .xz or .zst. `pyarrow`, which comes with `datasets`, is imported when a file needs it. A long "text"
comes in parts (`data.parts`) where the reader is told how to cut one.

Reading can begin at the place behind any row or part. Lines are reached by their byte, rows of a .parquet by their row
group, rows of an .arrow file by passing over those before; in a compressed file all before is decompressed.
"""

import codecs
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeGuard

from bitnet_train.data.parts import (
    WINDOW,
    Cut,
    Part,
    ReadAt,
    checked_characters,
    cut_stretches,
    cut_text,
    decoded,
    json_size,
    json_stretches,
    line_at,
    text_begins,
    utf8_size,
    utf8_stretches,
)
from bitnet_train.data.tables import Convert, converters
from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import MAX_DEPTH, is_deep, type_name

if TYPE_CHECKING:
    import pyarrow
    from _typeshed import WriteableBuffer as Buffer

Fields = dict[str, object]


class Place(NamedTuple):
    """Where in a file reading can begin: behind so many bytes (decompressed; 0 in tables) and so many lines or rows.

    `inside` is 0 at the border of a row. Else the text of row number + 1 has begun: in a table after so many of its
    characters, elsewhere at the offset.
    """

    offset: int = 0
    number: int = 0
    inside: int = 0


START = Place()
_TOO_WIDE = "requires too much memory"  # zstd of a window beyond its ZSTD_WINDOWLOG_LIMIT_DEFAULT, 2^27 bytes
_ARROW_ERRORS = (KeyError, NotImplementedError, MemoryError)  # what pyarrow raises beside OSError and ValueError
# Each row, or part of one, with the place behind it; numbers count lines or rows from 1. In the place of a wrong row
# stands its error.
PlacedRow = tuple[Place, Fields | UserError]
Placed = Iterator[PlacedRow]

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ROWS_AT_ONCE = 1024  # rows of a parquet file that are in memory together
_ROWS_AS_OBJECTS = 64  # of these, rows that are Python objects together
_READ_AT_ONCE = 1 << 18  # bytes
_EXPANDED_TIMES = 100  # text becomes three to ten times as large, a log that repeats itself fifty times
_EXPANDED_BYTES = 1 << 26  # what is smaller does no harm


def read_from(file: str, start: Place, on_read: Callable[[int], object] = int, cut: Cut | None = None) -> Placed:
    """Streams the rows of a file of a known format from a place on, each with the place behind it.

    A line that is no JSON object with each name once, or a row that is no UTF-8, gives its UserError instead of fields.

    Args:
        start: `START`, or a place that an earlier call gave.
        on_read: is told how many bytes of the file were read, each time.
        cut: where to cut a long "text"; None: it is given whole. The fields beside it come with its first part.

    Raises:
        UserError: an unknown format, a damaged file.
    """
    read, decompressed = _READERS[format_of(file)], _DECOMPRESSORS[_suffixes(file)[1]]
    try:
        with _open(file, on_read) as raw, decompressed(raw) as stream:
            bounded = stream if stream is raw else io.BufferedReader(_Bounded(file, raw, stream), _READ_AT_ONCE)
            yield from read(bounded, start, cut)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, *_ARROW_ERRORS) as error:
        raise UserError(f"{file}: {_unreadable(error)}") from None


def _unreadable(error: Exception) -> str:
    if _TOO_WIDE in str(error):
        return (
            "compressed with a window of more than 128 MB (zstd --long), which is not read here; write it anew "
            "without: zstd -d --long=31 --stdout FILE | zstd > NEW.zst"
        )
    return f"cannot be read, it may be damaged ({error})"


def format_of(file: str) -> str:
    """The format's suffix, as .jsonl for a/b.jsonl.gz. Raises UserError where it is unknown."""
    if not is_readable(file):
        raise UserError(f"{file}: unknown format {_suffixes(file)[0]!r}; {FORMATS} are read")
    return _suffixes(file)[0]


def is_readable(file: str) -> bool:
    """Whether the name ends as one of a known format."""
    return _suffixes(file)[0] in _READERS


def _suffixes(file: str) -> tuple[str, str]:
    """Format and compression: a/b.jsonl.gz -> (.jsonl, .gz); either may be empty."""
    path = Path(file)
    compression = path.suffix.lower() if path.suffix.lower() in _DECOMPRESSORS else ""
    return Path(path.stem if compression else path.name).suffix.lower(), compression


def _read_text(stream: io.BufferedIOBase, start: Place, cut: Cut | None) -> Placed:
    if start.number:
        return
    if cut is not None:
        yield from _text_parts(stream, start, cut)
        return
    data = stream.read()
    if data.strip():
        yield Place(len(data), 1), _or_error(_text_document, data)


def _text_document(data: bytes) -> Fields:
    return {"text": _decode(data)}


def _text_parts(stream: io.BufferedIOBase, start: Place, cut: Cut) -> Placed:
    with _seekable(stream) as file:
        look = _looked_at(file)
        begin = start.offset or len(codecs.BOM_UTF8) * look(0).startswith(codecs.BOM_UTF8)
        if not start.inside:
            try:
                if not _has_words(look, begin):
                    return
            except UserError as error:
                yield Place(os.fstat(file.fileno()).st_size, 1), error
                return
        for part in cut_stretches(utf8_stretches(look, begin), utf8_size, cut):
            _pass_over(stream, part.end)
            yield _behind(part, 0, part.end), {"text": part.text}


def _has_words(look: ReadAt, begin: int) -> bool:
    """Whether a text file holds more than blanks. Raises UserError where it is no text."""
    _refuse_utf16(look(0))
    words = [bool(checked_characters(stretch.text, "text").strip()) for stretch in utf8_stretches(look, begin)]
    return any(words)


def _behind(part: Part, number: int, end: int) -> Place:
    """The place behind a part of the row after so many."""
    return Place(end, number + 1) if part.is_last else Place(part.end, number, 1)


def _read_json_lines(stream: io.BufferedIOBase, start: Place, cut: Cut | None) -> Placed:
    _skip(stream, start.offset)
    place = start
    if start.inside and cut is not None:
        place = yield from _rest_of_line(stream, start, cut)
    offset, number = place.offset, place.number
    while line := stream.readline(-1 if cut is None else WINDOW):
        if len(line) == WINDOW and cut is not None and not line.endswith(b"\n"):
            offset, number, _ = yield from _long_line(stream, Place(offset, number), line, cut)
            continue
        offset, number = offset + len(line), number + 1
        if line.strip():
            yield Place(offset, number), _or_error(_json_object, line)


def _long_line(stream: io.BufferedIOBase, start: Place, head: bytes, cut: Cut) -> Generator[PlacedRow, None, Place]:
    """A row of which the head was read; its text is read in stretches if that begins in the head.

    Returns the place behind it.
    """
    size = text_begins(head)
    if size is None:
        line = head + stream.readline()
        place = Place(start.offset + len(line), start.number + 1)
        if line.strip():
            yield place, _or_error(_json_object, line)
        return place
    with _line(stream, start.offset, head) as look:
        begin = start.offset + size
        try:
            fields, end = _checked_row(look, head[:size], begin)
        except UserError as error:
            end = begin + sum(map(len, line_at(look, begin)))
            yield Place(end, start.number + 1), error
        else:
            for part in cut_stretches(json_stretches(look, begin), json_size, cut):
                _pass_over(stream, part.end)
                yield _behind(part, start.number, end), {**fields, "text": part.text}
                fields = {}
        _pass_over(stream, end)
    return Place(end, start.number + 1)


def _checked_row(look: ReadAt, head: bytes, begin: int) -> tuple[Fields, int]:
    """The fields of a row beside its text, and where its line ends. Raises UserError where it is no row."""
    for stretch in json_stretches(look, begin):
        checked_characters(stretch.text, "text")
        begin = stretch.end
    rest = b"".join(line_at(look, begin))
    return _json_object(head + rest), begin + len(rest)


def _rest_of_line(stream: io.BufferedIOBase, start: Place, cut: Cut) -> Generator[PlacedRow, None, Place]:
    """The row that a place lies in, from there on; it was checked when its beginning was read."""
    with _line(stream, start.offset, b"") as look:
        for part in cut_stretches(json_stretches(look, start.offset), json_size, cut):
            end = part.end + sum(map(len, line_at(look, part.end))) if part.is_last else part.end
            _pass_over(stream, end)
            yield _behind(part, start.number, end), {"text": part.text}
    return Place(end, start.number + 1)


@contextmanager
def _line(stream: io.BufferedIOBase, offset: int, head: bytes) -> Iterator[ReadAt]:
    """Reads a line at any offset: in the file, or in a temporary one with what it decompresses to.

    Args:
        head: bytes of the line, from the offset on, that were read from the stream.
    """
    if _is_plain(stream):
        yield _looked_at(stream)
        return
    with tempfile.TemporaryFile() as copy:
        copy.write(head)
        while data := stream.readline(_READ_AT_ONCE):
            copy.write(data)
            if data.endswith(b"\n"):
                break
        copy.flush()
        look = _looked_at(copy)
        yield lambda at: look(at - offset)


def _looked_at(file: io.BufferedIOBase | IO[bytes]) -> ReadAt:
    """Reads a file at offsets; where it stands stays."""
    return lambda offset: os.pread(file.fileno(), _READ_AT_ONCE, offset)


def _pass_over(stream: io.BufferedIOBase, offset: int) -> None:
    """Goes to an offset of a plain file, as if all before it had been read; others have been read already."""
    if _is_plain(stream) and (passed := offset - stream.tell()) > 0:
        stream.seek(offset)
        stream.raw.on_read(passed)


def _skip(stream: io.BufferedIOBase, count: int) -> None:
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (passed := stream.read(min(count, _READ_AT_ONCE))):
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
    if text.count("{") + text.count("[") > MAX_DEPTH:  # few lines have so many: none is walked through in vain
        check_depth(value, "the row")
    return value


def check_depth(value: object, name: str) -> None:
    """Raises UserError for a value of a row that is nested so deep that no recursive function could walk it."""
    if is_deep(value):
        raise UserError(f"{name} is nested more than {MAX_DEPTH} levels deep; drop the row")


def _unique(pairs: list[tuple[str, object]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the line has {twice!r} twice in one object; keep one of them")
    return fields


def _decode(data: bytes) -> str:
    _refuse_utf16(data)
    return decoded(data).removeprefix("\ufeff")


def _refuse_utf16(data: bytes) -> None:
    if data.startswith(_UTF16):
        raise UserError("the byte order mark says UTF-16; convert it: iconv -f UTF-16 -t UTF-8")


def _read_parquet(stream: io.BufferedIOBase, start: Place, cut: Cut | None) -> Placed:
    from pyarrow import parquet

    with _seekable(stream) as seekable:
        file = parquet.ParquetFile(seekable)
        groups = range(file.num_row_groups)
        ends = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
        group = bisect_right(ends, start.number) - 1
        if group < len(groups):
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups[group:])
            yield from rows_of(batches, ends[group], start, cut)


def _read_arrow(stream: io.BufferedIOBase, start: Place, cut: Cut | None) -> Placed:
    """Both containers: the stream that `datasets` writes, and the file (Feather 2), which begins with ARROW1."""
    from pyarrow import ipc

    with _seekable(stream) as seekable:
        is_file = seekable.read(6) == b"ARROW1"
        seekable.seek(0)
        reader = ipc.open_file(seekable) if is_file else ipc.open_stream(seekable)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from rows_of(batches, 0, start, cut)


def rows_of(batches: Iterable["pyarrow.RecordBatch"], number: int, start: Place, cut: Cut | None) -> Placed:
    """The rows from a place on; the first batch begins with row `number`, counted from 0.

    Offsets and lengths in a file are taken on trust by Arrow, which would read beyond the file: they are checked first.
    """
    for batch in batches:
        batch.validate(full=True)
        changes = converters(batch.schema)
        for first in range(max(start.number - number, 0), batch.num_rows, _ROWS_AS_OBJECTS):
            rows = batch.slice(first, _ROWS_AS_OBJECTS).to_pylist()
            for before, row in enumerate(rows, start=number + first):
                inside = start.inside if before == start.number else 0
                yield from _row_parts(_converted(row, changes), before, inside, cut)
        number += batch.num_rows


def _row_parts(content: Fields | UserError, before: int, inside: int, cut: Cut | None) -> Placed:
    """A row of a table after so many rows, without the first characters of its text, in parts if that is long."""
    text = None if isinstance(content, UserError) else content.get("text")
    if cut is None or isinstance(content, UserError) or not _is_long(text):
        yield Place(0, before + 1), content
        return
    fields = {} if inside else content
    for part, is_last in cut_text(text[inside:], cut):
        inside += len(part)
        yield Place(0, before + is_last, 0 if is_last else inside), {**fields, "text": part}
        fields = {}


def _is_long(text: object) -> TypeGuard[str]:
    """Whether it is a long text; one that is bad is left to whoever looks at whole rows."""
    if not isinstance(text, str) or len(text) <= WINDOW:
        return False
    try:
        checked_characters(text, "text")
    except UserError:
        return False
    return True


def _converted(row: Fields, changes: Mapping[str, Convert]) -> Fields | UserError:
    try:
        changed = {name: change(row[name]) for name, change in changes.items()}
        for name, value in changed.items():
            check_depth(value, name)  # JSON within a table; the types of the others are known
        return row | changed if changes else row
    except UserError as error:
        return error


@contextmanager
def _seekable(stream: io.BufferedIOBase) -> Iterator[io.BufferedIOBase]:
    """The stream itself if it is a plain file, else what it decompresses to, in a temporary file."""
    if _is_plain(stream):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


def _is_plain(stream: io.BufferedIOBase) -> TypeGuard["_PlainFile"]:
    """Whether the stream is a file as it lies on the disk."""
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _MeteredFile)


class _MeteredFile(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, file: str, on_read: Callable[[int], object]) -> None:
        super().__init__(file)
        self.on_read = on_read

    def readinto(self, buffer: "Buffer", /) -> int | None:
        """Fills the buffer."""
        count = super().readinto(buffer)
        self.on_read(count or 0)
        return count


class _PlainFile(io.BufferedReader):
    raw: _MeteredFile


class _Bounded(io.RawIOBase):
    """The content of a compressed file, within bounds.

    Raises (while reading):
        UserError: it is more than any text is compressed to.
    """

    def __init__(self, file: str, compressed: io.BufferedReader, stream: io.BufferedIOBase) -> None:
        self._file, self._compressed, self._stream = file, compressed, stream
        self._size = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        """Fills the buffer."""
        count = self._stream.readinto(buffer)
        self._size += count
        if self._size > max(_EXPANDED_BYTES, _EXPANDED_TIMES * self._compressed.tell()):
            raise UserError(
                f"{self._file}: decompresses to more than {_EXPANDED_TIMES} times its size, which no text does; look "
                "at what it holds before you decompress it"
            )
        return count


def _open(file: str, on_read: Callable[[int], object]) -> io.BufferedReader:
    try:
        return io.BufferedReader(_MeteredFile(file, on_read))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from None


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
_READERS: Mapping[str, Callable[[io.BufferedIOBase, Place, Cut | None], Placed]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FORMATS = f"{' '.join(_READERS)} (also with .gz .xz .zst)"  # as messages name them
