"""Names of data that lead to nothing, or to what cannot be read twice."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from bitnet_train.data.cache import content_of
from bitnet_train.data.digests import file_digest
from bitnet_train.data.encoding import TextEncoder
from bitnet_train.data.paths import expand, size_of
from bitnet_train.data.sources import read_rows
from bitnet_train.errors import UserError
from tests.support import tiny_tokenizer, write_jsonl

FORMATS = r"\.txt \.jsonl .*\(also with \.gz \.xz \.zst\)$"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good file."""
    write_jsonl(tmp_path / "good.jsonl", [{"text": "row"}])
    return tmp_path


def a_link(path: Path) -> None:
    path.symlink_to("/nope/x.jsonl")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the name of a socket is short


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("how", ["{folder}/x.jsonl", "{folder}", "{folder}/*.jsonl", "{folder}/**"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_link, r"a broken symbolic link to /nope/x\.jsonl; mend it or take it out$"),
        (a_link_to_itself, r"a broken symbolic link to .*/x\.jsonl; mend it or take it out$"),
        (a_pipe, rf"a pipe, and data is read more than once; write it to a file: {FORMATS}"),
        (a_socket, rf"a socket, and data is read more than once; write it to a file: {FORMATS}"),
        (a_device, rf"a device, and data is read more than once; write it to a file: {FORMATS}"),
    ],
)
def test_what_is_no_file_is_named_wherever_it_stands(
    folder: Path, make: Callable[[Path], None], message: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    make(folder / "x.jsonl")
    with pytest.raises(UserError, match=rf"/x\.jsonl: {message}"):
        expand(how.format(folder=folder))


@pytest.fixture
def process_substitution() -> Iterator[str]:
    """The path that a shell hands over for <(command)."""
    reader, writer = os.pipe()
    yield f"/dev/fd/{reader}"
    os.close(reader)
    os.close(writer)


def test_a_process_substitution_is_told_to_write_a_file(process_substitution: str) -> None:
    with pytest.raises(UserError, match=rf"^{process_substitution}: a pipe, and data is read more than once"):
        expand(process_substitution)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: a device, and data is read more than once"):
        read_rows(name)


def test_a_link_that_is_not_named_as_data_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("more", "notes.md"):
        (folder / name).symlink_to("/nope")
    assert expand(str(folder)) == [str(folder / "good.jsonl")]
    assert capsys.readouterr().err == f"data: {folder}: left alone, links to nothing: more, notes.md\n"
    with pytest.raises(UserError, match="/more: a broken symbolic link to /nope"):
        expand(str(folder / "more"))


def test_what_is_no_data_may_be_anything(folder: Path) -> None:
    (folder / ".#good.jsonl").symlink_to("somebody@machine.1234")  # an editor's lock
    os.mkfifo(folder / "control")
    assert expand(str(folder)) == [str(folder / "good.jsonl")]


def test_a_broken_link_is_no_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delattr(datasets, "load_dataset")
    Path("owner").mkdir()
    Path("owner/name").symlink_to("/nope")
    with pytest.raises(UserError, match=r"^owner/name: a broken symbolic link to /nope"):
        expand("owner/name")


@pytest.mark.parametrize("name", [b"m\xe4rz.jsonl", b"\xff\xfe.jsonl"])
def test_a_name_that_is_no_text_is_one_line(folder: Path, name: bytes) -> None:
    file = folder / os.fsdecode(name)
    file.write_text("{}\n")
    for path in (folder, file, folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"the name is not UTF-8; rename it"):
            expand(str(path))
    assert len(file_digest(file, folder)) == 64


@pytest.mark.parametrize("name", ["a\0b.jsonl", "*\0", "\ud800.jsonl"])
def test_a_name_that_cannot_exist_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="the name is not UTF-8"):
        expand(name)


def test_a_folder_that_cannot_be_listed_is_told_and_refused_where_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "deep" / "shut").mkdir(parents=True)
    listed = os.scandir

    def scandir(path: str) -> object:  # as root, no mode shuts a folder
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert expand(str(folder)) == [str(folder / "good.jsonl")]
    assert capsys.readouterr().err == f"data: {folder}: left alone, cannot be read (Permission denied): deep/shut\n"
    with pytest.raises(UserError, match=r"/shut: cannot be read \(Permission denied\); check the path and its perm"):
        expand(str(folder / "deep" / "shut"))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_file_that_changes_after_it_was_listed_is_one_line(
    folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = expand(str(folder))

    def refuse(*_: object, **__: object) -> None:
        raise error

    encoder = TextEncoder(tiny_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr("bitnet_train.data.readers._MeteredFile.__init__", refuse)
        with pytest.raises(UserError, match=rf"good\.jsonl: cannot be read \({error.strerror}\); check the path"):
            list(read_rows(file))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=rf"good\.jsonl: cannot be read \({error.strerror}\)"):
            content_of([file], encoder, folder)
    Path(file).unlink()
    assert size_of(file) is None


def test_a_pipe_among_the_files_of_a_saved_data_set_is_not_waited_for(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "row"}]).save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    shard.unlink()
    with pytest.raises(UserError, match=r"\.arrow: cannot be read \(No such file or directory\); check the path"):
        list(read_rows(str(tmp_path / "saved")))
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"\.arrow: a pipe, and data is read more than once"):
        list(read_rows(str(tmp_path / "saved")))
