"""Files of others, changed at random, and the commands that read them, one after the other in a process of their own.

A change puts a value of another type or size at a place of a JSON or YAML text or at a key of a GGUF file, takes a
field away, or cuts, inserts and overwrites bytes. A command has to end with exit code 0 or 2, within a minute and two
gigabytes, whatever it reads.
"""

import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bitnet_train.formats.gguf_file import GGUFFile, LazyBlocks, write_gguf
from tests.support import ROOT, environment

SECONDS, BYTES = 60, 2 << 30  # of one command

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.everything", __name__])
_FIRST = 12  # entries of a list or an object that are changed: a vocabulary would hide what stands beside it
_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
_ODD: list[Any] = [
    *(None, True, -1, 0, 1, 1.5, 1e-320, 1e308, float("inf"), float("nan"), 10**9, 2**40, 2**64, 10**400),
    *(
        "",
        "x",
        "1",
        "\x1b[2J",
        "\ud800",
        "\0",
        "a" * 10_000,
        [],
        {},
        ["x"],
        [1],
        [[1]],
        {"x": 1},
        {"content": 1},
        _DEEP,
    ),
]
_NUMBERS = [struct.pack("<I", number) for number in (0, 1, 3, 5, 8, 9, 99, 2**31, 2**32 - 1)]
_NUMBERS += [struct.pack("<Q", number) for number in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)]


class Group(NamedTuple):
    """Files in a folder, and the commands, as lists of words, that read them."""

    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


class Explorer(multiprocessing.context.ForkServerProcess):
    """A process that tries so many changes; what failed is in `log`, and its exit code is 0 where nothing did."""

    def __init__(self, group: Group, folder: Path, examples: int, log: Path) -> None:
        super().__init__(target=_explore, args=(group, folder, examples, log, environment()), daemon=True)
        self.start()


def _explore(group: Group, folder: Path, examples: int, log: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    with log.open("a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, resource.RLIM_INFINITY))
    failed: list[str] = []
    own = {*folder.iterdir()}

    @settings(
        max_examples=examples,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        file = Path(data.draw(st.sampled_from(group.files)))
        original = file.read_bytes()
        what, changed = data.draw(_changes(file, original))
        command = data.draw(st.sampled_from(group.commands))
        print(f"\n## {file}: {what}\n## {' '.join(command)}", flush=True)
        file.write_bytes(changed)
        try:
            code = _code_of(command)
        finally:
            file.write_bytes(original)
            for made in {*folder.iterdir()} - own:
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        if code not in (0, 2):
            failed.append(f"{file}: {what}: {' '.join(command)}: {code}")

    try_one()
    sys.stdout.flush()
    print("\n# failed\n" + "\n".join(failed), flush=True)
    os._exit(bool(failed))


def _code_of(command: Sequence[str]) -> object:
    """The exit code of a command, or the exception that ended it."""
    before = sys.argv, os.getcwd()
    sys.argv = list(command)
    signal.alarm(SECONDS)
    try:
        if command[0] == "bitnet_train":
            runpy.run_module("bitnet_train", run_name="__main__")
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        sys.argv = before[0]
        os.chdir(before[1])
    return 0


def _changes(file: Path, original: bytes) -> st.SearchStrategy[tuple[str, bytes]]:
    """A change of a file, in words, and its new content."""
    if file.suffix == ".gguf":
        return _bytes(original, _places(file)) | _keys(file)
    if file.suffix not in (".json", ".jsonl", ".yaml", ".md"):
        return _bytes(original, [])
    return st.one_of(
        _fields(file.suffix, original.decode()), _fields(file.suffix, original.decode()), _bytes(original, [])
    )


def _fields(suffix: str, text: str) -> st.SearchStrategy[tuple[str, bytes]]:
    first, newline, rest = text.partition("\n")
    if suffix in (".yaml", ".md"):
        head = text.removeprefix("---\n").partition("\n---\n")[0]
        return _edits(yaml.safe_load(head)).map(
            lambda edit: (
                (edit[0], f"---\n{yaml.safe_dump(edit[1])}\n---\ntext\n".encode(errors="replace"))
                if suffix == ".md"
                else (edit[0], yaml.safe_dump(edit[1]).encode(errors="replace"))
            )
        )
    if suffix == ".jsonl":
        return _edits(json.loads(first)).map(lambda edit: (edit[0], f"{json.dumps(edit[1])}{newline}{rest}".encode()))
    return _edits(json.loads(text)).map(lambda edit: (edit[0], json.dumps(edit[1]).encode()))


def _edits(content: Any) -> st.SearchStrategy[tuple[str, Any]]:
    """The content with another value at some place, or without the field there."""
    places = st.sampled_from(list(_paths(content)))
    put = st.tuples(places, st.sampled_from(_ODD)).map(lambda e: (f"{e[0]} = {str(e[1])[:50]!r}", _put(content, *e)))
    return put | places.map(lambda path: (f"without {path}", _without(content, path)))


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(content, dict | list):
        entries = list(content.items() if isinstance(content, dict) else enumerate(content))
        for key, value in entries[: 40 if not path else _FIRST]:
            yield from _paths(value, (*path, key))


def _put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = _put(content[path[0]], path[1:], value)
    return copy


def _without(content: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return None
    copy = content.copy()
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _without(content[path[0]], path[1:])
    return copy


def _bytes(original: bytes, places: Sequence[int]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Cut, with bytes inserted, or overwritten with a number: anywhere, or where a header has one."""
    anywhere = st.integers(0, max(0, min(len(original), 20_000) - 1))
    places_in = (st.sampled_from(places) | anywhere) if places else anywhere
    inserted = st.sampled_from(
        [b"\xff\xfe", b"\0", b"[" * 100_000, b"{" * 300, b"{% for i in range(9) %}", b"\n---\n", b"&a "]
    )
    return st.one_of(
        anywhere.map(lambda at: (f"cut at {at}", original[:at])),
        st.tuples(anywhere, inserted).map(
            lambda e: (f"{e[1][:9]!r} at {e[0]}", original[: e[0]] + e[1] + original[e[0] :])
        ),
        st.tuples(places_in, st.sampled_from(_NUMBERS)).map(
            lambda e: (f"{e[1]!r} over {e[0]}", original[: e[0]] + e[1] + original[e[0] + len(e[1]) :])
        ),
    )


def _places(file: Path) -> list[int]:
    """Where the header of a GGUF file has a number: behind its names."""
    data, stored = file.read_bytes(), GGUFFile(file)
    ends = [data.index(name.encode()) + len(name) for name in (*stored.metadata, *stored.tensors)]
    return [4, 8, 16, *(end + more for end in ends for more in (0, 4, 8, 12, 20, 24))]


def _keys(file: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    stored, other = GGUFFile(file), file.with_name("changed")
    tensors = {
        name: LazyBlocks(stored.kind(name), info.shape, [partial(bytes, stored.read(name))])
        for name, info in stored.tensors.items()
    }

    def written(edit: tuple[str, Any]) -> tuple[str, bytes]:
        keys = edit[1]
        write_gguf(other, keys.pop("general.architecture", "none"), keys, tensors)
        return edit[0], other.read_bytes()

    odd = st.sampled_from(
        [True, -1, 0, 1, 1.5, float("inf"), 10**9, 2**40, 2**63, "", "x", "\0", [1], ["x"], [1.5], [True]]
    )
    places = st.sampled_from([(key,) for key in stored.metadata])
    more = st.sampled_from([("general.alignment",), ("tokenizer.ggml.scores",), ("bitnet-b1.58.rope.scaling.type",)])
    put = st.tuples(places | more, odd).map(lambda e: (f"{e[0]} = {e[1]!r}", _put({**stored.metadata, e[0][0]: 0}, *e)))
    return (put | places.map(lambda path: (f"without {path}", _without(stored.metadata, path)))).map(written)
