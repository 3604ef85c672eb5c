"""Files that nobody else can have written."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from bitnet_train.kernels import own_files
from bitnet_train.kernels.own_files import open_own, own_folder, seal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "library"
    path.write_bytes(b"code")
    seal(path)
    return path


def test_a_sealed_file_is_opened(file: Path) -> None:
    descriptor = open_own(file)
    assert os.pread(descriptor, 4, 0) == b"code"
    os.close(descriptor)
    assert not file.stat().st_mode & 0o077


def test_a_folder_is_named_without_its_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert own_folder(tmp_path / "link") == tmp_path.resolve()


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_every_folder_above_is_looked_at(tmp_path: Path, mode: int) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a").chmod(mode)
    with pytest.raises(
        PermissionError, match=rf"^{tmp_path}/a can be written by others: chmod go-w {tmp_path}/a, or set XDG"
    ):
        own_folder(tmp_path / "a" / "b" / "c")
    (tmp_path / "a").chmod(mode | 0o1000)  # sticky, as /tmp
    assert own_folder(tmp_path / "a" / "b" / "c") == (tmp_path / "a" / "b" / "c").resolve()


def test_what_a_link_leads_to_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "open" / "deep").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "deep")
    with pytest.raises(PermissionError, match="/open can be written by others"):
        own_folder(tmp_path / "link")


def test_a_group_of_others_may_not_write_and_the_users_own_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o775)
    monkeypatch.setattr(own_files, "_is_private", lambda group: group == os.stat(tmp_path / "a").st_gid)
    own_folder(tmp_path / "a")
    monkeypatch.setattr(own_files, "_is_private", lambda group: False)
    with pytest.raises(PermissionError, match="can be written by others"):
        own_folder(tmp_path / "a")


def test_a_private_group_has_the_users_name_and_no_other_member(monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped(name: str, *members: str) -> bool:
        entry = grp.struct_group((name, "x", 1, [*members]))
        monkeypatch.setattr("grp.getgrgid", lambda group: entry)
        return own_files._is_private(1)

    user = pwd.struct_passwd(("ann", "x", 1, 1, "", "/", "/bin/sh"))
    monkeypatch.setattr("pwd.getpwuid", lambda number: user)
    assert grouped("ann")
    assert grouped("ann", "ann")
    assert not grouped("ann", "ann", "bob")
    assert not grouped("users")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a container runs any number
    assert not grouped("ann")


def test_what_belongs_to_others_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_files, "_trusted", lambda: {os.geteuid() + 1})
    for call in (lambda: open_own(file), lambda: own_folder(file.parent)):
        with pytest.raises(
            PermissionError, match="belongs to another user; set XDG_CACHE_HOME to a folder of your own"
        ):
            call()


@pytest.mark.parametrize("size", [0, 10, 35])
def test_a_file_that_was_cut_is_damaged(file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(OSError, match="library is damaged"):
        open_own(file)


def test_a_pipe_and_a_link_are_no_files(file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="pipe is no file"):
        open_own(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic links"):
        open_own(tmp_path / "link")
