"""SHA-256 of files, remembered by size and time of change, so that a corpus is not hashed at every start.

A file that changed in the two seconds before it was hashed is not remembered: a second change within the resolution of
the file system's clock would go unseen (git's index knows the same race).
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from bitnet_train.formats.atomic import atomic_file

_WORTH_REMEMBERING = 1 << 24  # bytes; smaller files are hashed in milliseconds
_RACE = 2.0  # seconds


def file_digest(file: Path, memory: Path) -> str:
    """`sha256_of` a file, or what it was when it was last asked for, if the file has not changed since.

    Args:
        memory: folder where hashes of large files are kept, one small file each.

    Raises:
        OSError: the file cannot be read.
    """
    stat = file.stat()
    if stat.st_size < _WORTH_REMEMBERING:
        return sha256_of(file)
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    entry, stamp = memory / f"{name}.json", [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    known = _read(entry)
    if known and known["stamp"] == stamp:
        return str(known["sha256"])
    digest = sha256_of(file)
    if time.time() - stat.st_mtime > _RACE:
        with atomic_file(entry) as temporary:
            temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def fingerprint_of(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's numbers, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(entry: Path) -> dict[str, object] | None:
    try:
        known = json.loads(entry.read_text())
        return known if {"stamp", "sha256"} <= known.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
