"""What a chat template wrote, to token ids: names of special tokens are tokens, but for those in a message.

pieces     the text, cut where an assistant's answers begin and end
runs       the text, cut around names of special tokens that messages hold ("quoted"), as transformers cuts it with
           sanitize_control_tokens=True: nobody ends a turn by typing <|eot_id|>
ids        those of a whole run, as transformers has them, where no token reaches from one piece into the next. Where
           one does the run is cut there: a prompt ends where an answer begins, and a model that generates sees no
           further. "Assistant: " and "Hello" would share the space before the word.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import tokenizers

from bitnet_train.data.template import QUOTE_END, QUOTE_START

_QUOTE_MARKS = re.compile(f"[{QUOTE_START}{QUOTE_END}]")
_STEPS = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")  # what is done to a text before its tokens


class _Run(NamedTuple):
    """Text that is encoded in one go.

    Attributes:
        edges: where pieces begin in it, in characters from its start.
        quoted: it is the name of a special token that a message holds, and stays text.
    """

    text: str
    edges: list[int]
    quoted: bool


class PieceEncoder:
    """Encodes pieces of text.

    Args:
        backend: adds nothing to a text, and has no post-processor: ByteLevel's would leave spaces out of the offsets.
        special_ids: the special tokens, by name.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: Mapping[str, int]) -> None:
        self._backend, self._special_ids = backend, frozenset(special_ids.values())
        self.special_names = any_of(special_ids)
        name = self.special_names.pattern  # one mark is enough: a template may have cut the other away
        self._quoted = re.compile(f"{QUOTE_START}({name}){QUOTE_END}?|({name}){QUOTE_END}")

    def quote(self, text: str) -> str:
        """The text with marks around every name of a special token, so that `encode` reads it as text."""
        return self.special_names.sub(f"{QUOTE_START}\\g<0>{QUOTE_END}", _QUOTE_MARKS.sub("", text))

    def encode(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of each of consecutive pieces of a text; see the module's text."""
        runs, begins = self._runs(pieces)
        encoded = [self._encode(run.text, run.edges, index > 0, run.quoted) for index, run in enumerate(runs)]
        first = [0, *accumulate(len(ids) for ids, _ in encoded)]  # ids before each run
        counts = [first[run] + encoded[run][1][edge] for run, edge in begins]
        ids = [id for run_ids, _ in encoded for id in run_ids]
        return [ids[start:end] for start, end in pairwise([*counts, len(ids)])]

    def _encode(self, text: str, edges: Sequence[int], continues: bool, quoted: bool) -> tuple[list[int], list[int]]:
        """Ids of a text, and how many of them stand before each edge, a position in the text in ascending order."""
        ids, starts, ends = self._with_offsets(text, continues, quoted)
        if quoted and not self._special_ids.isdisjoint(
            ids
        ):  # a vocabulary that holds the name as a word: letter by letter
            return [id for letter in text for id in self._with_offsets(letter, True, quoted)[0]], []
        counts = [bisect_left(starts, edge) for edge in edges]
        crossed = [edge for edge, count in zip(edges, counts, strict=True) if count and ends[count - 1] > edge]
        if not crossed:
            return ids, counts
        ids, counts = [], []
        for start, end in pairwise([0, *dict.fromkeys(crossed), len(text)]):
            inside = [edge - start for edge in edges if start <= edge < end or edge == end == len(text)]
            part_ids, part_counts = self._encode(text[start:end], inside, continues or start > 0, quoted)
            counts += [len(ids) + count for count in part_counts]
            ids += part_ids
        return ids, counts

    def _with_offsets(self, text: str, continues: bool, quoted: bool) -> tuple[list[int], list[int], list[int]]:
        """Ids, and the characters at which the text of each begins and ends.

        Args:
            continues: other text stands before it, so that it gets no space in front.
            quoted: names of special tokens are text.
        """
        parts = [(self._backend, text, 0)]
        if continues and self._without_prefix is not None:
            name = None if quoted else self._added_names.search(text)
            end = name.start() if name else len(text)  # behind an added token a text begins anew
            parts = [(self._without_prefix, text[:end], 0), (self._backend, text[end:], end)]
        ids, starts, ends = [], [], []
        for backend, part, before in parts:
            backend.encode_special_tokens = quoted
            encoding = backend.encode(part, add_special_tokens=False)
            backend.encode_special_tokens = True
            ids += encoding.ids
            starts += [before + start for start, _ in encoding.offsets]
            ends += [before + end for _, end in encoding.offsets]
        return ids, starts, ends

    def _runs(self, pieces: Sequence[str]) -> tuple[list[_Run], list[tuple[int, int]]]:
        """The joined pieces as runs; and for each piece the run in which it begins and the number of its edge there."""
        runs = [_Run("", [], quoted=False)]
        begins = []
        for piece in pieces:
            begins.append((len(runs) - 1, len(runs[-1].edges)))
            runs[-1].edges.append(len(runs[-1].text))
            for text, quoted in self._parts(piece):
                if quoted == runs[-1].quoted:
                    runs[-1] = runs[-1]._replace(text=runs[-1].text + text)
                elif text:
                    runs.append(_Run(text, [], quoted))
        return runs, begins

    def _parts(self, piece: str) -> Iterator[tuple[str, bool]]:
        """Text, quoted name, text, quoted name, ..., text."""
        position = 0
        for match in self._quoted.finditer(piece):
            yield _QUOTE_MARKS.sub("", piece[position : match.start()]), False
            yield match[1] or match[2], True
            position = match.end()
        yield _QUOTE_MARKS.sub("", piece[position:]), False

    @cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer | None:
        """The tokenizer that puts no space in front of a text; None where this one puts none."""
        stored = json.loads(self._backend.to_str())
        changed = _prefix_free(stored)
        return None if changed == stored else tokenizers.Tokenizer.from_str(json.dumps(changed))

    @cached_property
    def _added_names(self) -> re.Pattern[str]:
        return any_of(token.content for token in self._backend.get_added_tokens_decoder().values())


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest of several."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _prefix_free(node: Any) -> Any:
    """A part of tokenizer.json without what puts a space in front of a text."""
    if isinstance(node, list):
        return [_prefix_free(part) for part in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _prefix_free(part) if key in _STEPS else part for key, part in node.items()}
    if node.get("type") == "Metaspace":
        return changed | {"prepend_scheme": "never"}
    if node.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    return changed | ({"add_prefix_space": False} if node.get("type") == "ByteLevel" else {})
