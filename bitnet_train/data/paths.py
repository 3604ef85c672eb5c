"""Expands the names that a user gives data: files, globs, folders, saved data sets, hub ids.

    rows.jsonl, shards/*.parquet    files
    folder                          the files of known formats in it, at any depth, links followed
    folder@test                     those of one split, by their names or by what `datasets` saved
    owner/name[:config][@split]     a data set of the Hugging Face hub

In a folder these are no rows and left alone: hidden files, run directories, caches, files that describe a data set or
a model, licences. Told, and left alone: links to nothing that are not named as data, subfolders that cannot be listed
(lost+found). Where the names of files say what is a train split, other splits are left alone, and told.
"""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from bitnet_train.data.entries import check_entry, check_name, is_broken_link, unreadable
from bitnet_train.data.hub import is_hub_id
from bitnet_train.data.notices import say_once
from bitnet_train.data.readers import FORMATS, format_of, is_readable
from bitnet_train.data.saved import files_of, is_saved, splits_of
from bitnet_train.errors import UserError

CACHE_TAG = "CACHEDIR.TAG"  # https://bford.info/cachedir: a folder of things that can be made again

# What datasets, the hub and transformers write beside data, and texts that a repository has.
_NO_ROWS = re.compile(
    r"(dataset_dict|dataset_infos?|state|config|generation_config|preprocessor_config|adapter_config|package"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|model\.safetensors\.index)\.json"
    r"|(licen[cs]e|readme|notice|copying|changelog|citation|requirements|merges|vocab)([._-].*)?\.txt",
    re.IGNORECASE,
)
_NAMED = 5  # files in a message
# The words by which `datasets` tells splits apart (data_files.py).
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_SPLIT_WORDS = {split: re.compile(rf"(^|[ ._/-])({words})([ ._/-]|$)") for split, words in _SPLITS.items()}


def expand(paths: str | Sequence[str]) -> list[str]:
    """The files, saved data sets and hub ids that names stand for, sorted and once each: the same on every machine.

    Raises:
        UserError: a path or a glob that matches nothing, a broken link, a pipe, a file of an unknown format, a split
            that is not there.
    """
    names = [paths] if isinstance(paths, str) else paths
    files = sorted({file for name in names for file in _expand_one(str(name))})
    if not files:
        raise UserError("no data path was given; name a file, a glob, a folder or a hub id")
    return files


def size_of(name: str) -> int | None:
    """The bytes of a file or of a saved data set; None where they are unknown, as on the hub."""
    try:
        files = files_of(Path(name)) if os.path.isdir(name) else [Path(name)]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return None


def _expand_one(name: str) -> list[str]:
    check_name(name)
    if os.path.lexists(name):
        return _existing(name)
    folder, _, split = name.rpartition("@")
    if folder and os.path.isdir(folder):
        return _in_folder(Path(folder), split)
    if is_hub_id(name):
        return [name]
    files = [file for match in glob.glob(name, recursive=True) for file in _expand_one(match)]
    if not files:
        raise UserError(
            f"{name}: no such file or folder, and as a glob it matches nothing; check the path (a hub id is owner/name)"
        )
    return files


def _existing(name: str) -> list[str]:
    check_entry(Path(name))
    if os.path.isdir(name):
        return _in_folder(Path(name), None)
    format_of(name)
    return [name]


def _in_folder(folder: Path, split: str | None) -> list[str]:
    """The files of a folder, or of one split of it; without, of train where names tell splits apart."""
    left_alone: dict[str, list[str]] = defaultdict(list)
    found = {name: _split_of(name, folder) for name in _walk(folder, left_alone)}
    for reason, names in left_alone.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        say_once(f"{folder}: left alone, {reason}: {', '.join(sorted(names)[:_NAMED])}{more}")
    splits = sorted({of for of in found.values() if of is not None})
    if split is not None and split not in splits:
        has = f"has {', '.join(splits)}" if splits else "tells no splits apart"
        raise UserError(f"{folder}@{split}: no such split; the folder {has}")
    if split is None and splits and "train" not in splits and splits_of(folder):
        raise UserError(f"{folder}: holds the splits {', '.join(splits)}, no train; name one as {folder}@{splits[0]}")
    wanted = {split} if split is not None else {"train", None} if "train" in splits else {None, *splits}
    files = [name for name, of in found.items() if of in wanted]
    if not files:
        raise UserError(f"{folder}: the folder holds no file of {FORMATS}; check the path (a hub id is owner/name)")
    left = [of for of in splits if of not in wanted]
    if left and split is None:
        say_once(f"{folder}: the split train is read, {', '.join(left)} not (to name one: {folder}@{left[0]})")
    return files


def _split_of(name: str, folder: Path) -> str | None:
    """The split that a file belongs to: by the name that `datasets` saved it under, or by the words in its path."""
    path = Path(name)
    if path.is_dir() and splits_of(path.parent):
        return path.name
    below = path.relative_to(folder).as_posix().lower()
    return next((split for split, words in _SPLIT_WORDS.items() if words.search(below)), None)


def _walk(folder: Path, left_alone: dict[str, list[str]]) -> Iterator[str]:
    """The files of known formats and the saved data sets of a folder, at any depth.

    Args:
        left_alone: gets what could have been data and is not read, by the reason.
    """
    seen: set[str] = set()

    def unlisted(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise unreadable(folder, error)
        left_alone[f"cannot be read ({error.strerror})"].append(os.path.relpath(error.filename, folder))

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unlisted):
        here, real = Path(root), os.path.realpath(root)
        files.sort()
        if real in seen or CACHE_TAG in files or ".hydra" in folders:  # a circle of links, a cache, a run directory
            folders.clear()
            continue
        seen.add(real)
        if splits := splits_of(here):
            folders.clear()
            yield from (str(here / split) for split in splits)
        elif is_saved(here):
            folders.clear()
            yield str(here)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in files:
                if reason := _no_rows(here, name):
                    left_alone[reason].append(name)
                if reason is not None:
                    continue
                check_entry(here / name)
                file = os.path.realpath(here / name)
                if file not in seen:  # no link beside its file
                    seen.add(file)
                    yield str(here / name)


def _no_rows(folder: Path, name: str) -> str | None:
    """Why an entry is left alone, "" where nobody is told; None for one that holds rows."""
    if name.startswith("."):
        return ""
    if not is_readable(name):
        return "links to nothing" if is_broken_link(folder / name) else ""
    return "by their names no rows" if _NO_ROWS.fullmatch(name) else None
