"""A second name for an entry of a folder, with symbolic links and without."""

import errno
import os
from pathlib import Path

import pytest

from bitnet_train.formats.link import followed, point


@pytest.fixture(params=[None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two entries, on a file system with links or with none."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(os, "symlink", refuse)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_name_leads_to_what_it_was_pointed_at_last(folder: Path) -> None:
    for name in ("a", "b"):
        point(folder / "last", name)
        assert followed(folder / "last") == folder / name
    assert {path.name for path in folder.iterdir()} == {"a", "b", "last"}


@pytest.mark.parametrize("text", ["", "missing\n", "..\n", "../a\n", "a/b\n", "x" * 1000, "\udcff", "\n"])
def test_a_text_that_names_no_entry_leads_nowhere(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "last").write_text(text, errors="surrogateescape")
    assert followed(tmp_path / "last") == tmp_path / "last"


def test_a_path_without_a_second_name_is_itself(tmp_path: Path) -> None:
    assert followed(tmp_path) == tmp_path
    assert followed(tmp_path / "missing") == tmp_path / "missing"
