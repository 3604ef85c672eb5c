"""Long documents in parts, so that nothing holds all of one: the tokenizer takes 300 bytes of memory for a character.

    document  ->  parts of at most PART_CHARACTERS  ->  ids of each  ->  joined: the ids of the document

Parts are rows that follow each other; `Place.inside` says that a document has begun. They are cut between two tokens
(`Tokenizer.cut`), so that their ids are those of the whole text. What is wrong with a document is known before its
first part is given: where it is read from a file in stretches, it is read twice.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from bitnet_train.errors import UserError

PART_CHARACTERS = 1 << 18
CONTEXT = 256  # characters on either side of a cut that decide about it: more than a word
WINDOW = PART_CHARACTERS + CONTEXT  # what is no longer is no long document
Cut: TypeAlias = Callable[[str], int]  # the next WINDOW characters of a text -> how many of them make a part
ReadAt: TypeAlias = Callable[[int], bytes]  # some bytes of a file from an offset on; none at its end

_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR, _ONE = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}", rb"\\u[0-9a-fA-F]{4}"
_ESCAPE = re.compile(rb"%b|%b|\\[^u]" % (_PAIR, _ONE), re.DOTALL)  # each is one character
_UNITS = re.compile(rb'(?:[^\\"]++|%b|%b|\\[^u])*+' % (_PAIR, _ONE), re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
_HALF_A_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*%b" % _HALF.pattern)
_LONGEST_ESCAPE = 12  # bytes
_TEXT_BEGINS = re.compile(rb'"text"\s*:\s*"')
_TRIES = 64  # of places that a pattern finds
# Borders of words, and in how many characters before the end of a part they are looked for: line ends, blanks, letters
# beside what is none.
_BORDERS = (
    (re.compile(r"(?<=\n)(?=\S)"), 1 << 13),
    (re.compile(r"(?<=\S)(?= \S)"), PART_CHARACTERS),
    (re.compile(r"(?<=[^\W\d_])(?=[\W\d_])|(?<=[\W\d_])(?=[^\W\d_])"), PART_CHARACTERS),
)


class Stretch(NamedTuple):
    """Some characters of a file, and the bytes at `begin` that they are there."""

    text: str
    data: bytes
    begin: int

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.begin + len(self.data)


class Part(NamedTuple):
    """Consecutive characters of a document, and where their bytes end in the file."""

    text: str
    end: int
    is_last: bool


def anywhere(window: str) -> int:
    """A `Cut` for what only counts characters."""
    return PART_CHARACTERS


def at_blanks(window: str) -> int:
    """A `Cut` in front of a blank or behind a line, for what looks at words alone."""
    found = max(window.rfind(" ", 1, PART_CHARACTERS), window.rfind("\n", 0, PART_CHARACTERS - 1) + 1)
    return found if found > 0 else PART_CHARACTERS


def places(window: str) -> Iterator[int]:
    """Places in a window where a tokenizer may let itself be cut, the likeliest and the latest first."""
    for pattern, reach in _BORDERS:
        begin = max(PART_CHARACTERS - reach, CONTEXT)
        found = [match.start() for match in pattern.finditer(window, begin, PART_CHARACTERS + 1)]
        yield from reversed(found[-_TRIES:])


def checked_characters(text: str, field: str) -> str:
    """The text, if all of it are characters. Raises UserError that names the field."""
    if "\0" in text or _SURROGATE.search(text):
        raise UserError(f"{field} holds NUL bytes or lone surrogates, which are no text; clean or drop the row")
    return text


def cut_text(text: str, cut: Cut) -> Iterator[tuple[str, bool]]:
    """The parts of a text in memory, and whether each is the last."""
    begin = 0
    while len(text) - begin > WINDOW:
        size = cut(text[begin : begin + WINDOW])
        yield text[begin : begin + size], False
        begin += size
    yield text[begin:], True


def cut_stretches(stretches: Iterator[Stretch], size_of: Callable[[bytes, int], int], cut: Cut) -> Iterator[Part]:
    """The parts of a text that comes in stretches.

    Args:
        size_of: how many of a stretch's bytes are its first so many characters.
    """
    held: list[Stretch] = []
    for stretch in stretches:
        held.append(stretch)
        while sum(len(one.text) for one in held) > WINDOW:
            text = "".join(one.text for one in held)
            size = cut(text[:WINDOW])
            held = _without(held, size, size_of)
            yield Part(text[:size], held[0].begin, is_last=False)
    yield Part("".join(one.text for one in held), held[-1].end if held else 0, is_last=True)


def _without(held: Sequence[Stretch], count: int, size_of: Callable[[bytes, int], int]) -> list[Stretch]:
    """The stretches without their first characters; they have more than so many."""
    for number, (text, data, begin) in enumerate(held):
        if count < len(text):
            size = size_of(data, count)
            return [Stretch(text[count:], data[size:], begin + size), *held[number + 1 :]]
        count -= len(text)
    raise AssertionError("a part is shorter than what is held")


def utf8_stretches(read: ReadAt, begin: int) -> Iterator[Stretch]:
    """A text file from a character on.

    Raises:
        UserError: it is no UTF-8.
    """
    while data := read(begin):
        size = len(data) - _unfinished(data)
        yield Stretch(decoded(data[: size or len(data)], begin), data[:size], begin)
        begin += size


def utf8_size(data: bytes, count: int) -> int:
    """Bytes of the first characters of a text in UTF-8."""
    return len(data.decode()[:count].encode())


def json_stretches(read: ReadAt, begin: int) -> Iterator[Stretch]:
    """A string of a JSON text from a character on, up to its closing quote.

    Raises:
        UserError: it is no string.
    """
    while data := read(begin):
        size = _units(data)
        if not size and not data.startswith(b'"') and len(data) >= _LONGEST_ESCAPE:
            break  # an escape that is none
        yield Stretch(_unescaped(data[:size], begin), data[:size], begin)
        if data[size : size + 1] == b'"':
            return
        begin += size
        if not size:
            break
    raise UserError("the line is no JSON (a string in it does not end); write one object per line")


def json_size(data: bytes, count: int) -> int:
    """Bytes of the first characters of a string in JSON."""
    position = 0
    for escape in _ESCAPE.finditer(data):
        plain = len(data[position : escape.start()].decode())
        if plain >= count:
            break
        count -= plain + 1
        position = escape.end()
    return position + utf8_size(data[position:], count)


def text_begins(line: bytes) -> int | None:
    """Where in the beginning of a JSON object the string of its field "text" begins."""
    for match, _ in zip(_TEXT_BEGINS.finditer(line), range(_TRIES), strict=False):
        try:
            fields = json.loads(line[: match.end()].decode("utf-8-sig") + '"}')
        except (ValueError, RecursionError):
            continue  # within another field
        if isinstance(fields, dict) and list(fields)[-1] == "text":
            return match.end()
    return None


def line_at(read: ReadAt, begin: int) -> Iterator[bytes]:
    """The rest of a line piece by piece, with its end."""
    while data := read(begin):
        rest, end, _ = data.partition(b"\n")
        yield rest + end
        if end:
            return
        begin += len(data)


def decoded(data: bytes, begin: int = 0) -> str:
    """The text of bytes in UTF-8. Raises UserError with the place of what is none, counted from `begin`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte, position = data[error.start], begin + error.start
        raise UserError(f"byte 0x{byte:02x} at {position} is not UTF-8; convert the file with iconv") from None


def _unescaped(data: bytes, begin: int) -> str:
    try:
        text: str = json.loads(f'"{decoded(data, begin)}"')
        return text
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the line is no JSON ({error}); write one object per line") from None


def _units(data: bytes) -> int:
    """How many bytes in front are whole characters of a JSON string."""
    found = _UNITS.match(data)
    assert found is not None
    end = found.end()
    if data[end : end + 1] == b'"':
        return end
    # The second pattern looks at every byte, and only a backslash before the first decides about it.
    if _HALF.match(data[:end], max(end - 6, 0)) and _HALF_A_PAIR.search(data[:end]):
        return end - 6
    return end - _unfinished(data[max(end - 4, 0) : end])


def _unfinished(data: bytes) -> int:
    """How many bytes at the end belong to a character in UTF-8 that goes on."""
    for count, byte in enumerate(reversed(data[-3:]), start=1):
        if byte < 0x80:
            return 0
        if byte >= 0xC0:  # the first of two, three or four
            return count if count < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0
