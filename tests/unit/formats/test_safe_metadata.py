"""Sharded checkpoints: good ones are read bit for bit, and nothing in one is run."""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bitnet_train.errors import UserError
from bitnet_train.formats.safe_metadata import METADATA, SafeReader, load_metadata

pytestmark = pytest.mark.fault

TENSORS = {
    "weight": torch.arange(12.0).view(3, 4),
    "codes": torch.ones(5, dtype=torch.int8),
    "half": torch.ones(2).bfloat16(),
}


class Runs:
    """A pickle of it calls something when it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(dict(TENSORS), checkpoint_id=tmp_path / "sharded", no_dist=True)
    return tmp_path / "sharded"


def metadata_of(folder: Path) -> Metadata:
    content: Metadata = pickle.loads((folder / METADATA).read_bytes())
    return content


def test_what_torch_wrote_is_read_bit_for_bit(folder: Path) -> None:
    assert load_metadata(folder) == metadata_of(folder)
    read = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load(read, storage_reader=SafeReader(folder), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_a_payload_does_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    payload = Runs(os.mkdir, str(tmp_path / "ran"))
    content: Any = payload
    if place == "inside":
        content = metadata_of(folder)
        content.planner_data = {"weight": payload}
    (folder / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"sharded/\.metadata: is not read: it asks for posix\.mkdir"):
        SafeReader(folder).read_metadata()
    assert not (tmp_path / "ran").exists()
    with suppress(AttributeError):
        FileSystemReader(folder).read_metadata()  # torch's own
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.getattr", "torch.load", "torch.hub.load", "pathlib.os.system"])
def test_no_other_name_is_looked_up(folder: Path, name: str) -> None:
    module, _, attribute = name.partition(".")
    (folder / METADATA).write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match="it asks for"):
        load_metadata(folder)


def test_a_value_that_is_a_pickle_of_its_own_is_refused(folder: Path) -> None:
    content = metadata_of(folder)
    content.state_dict_metadata["step"] = BytesStorageMetadata()
    (folder / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="step is a pickle, only tensors are read"):
        load_metadata(folder)


def test_files_elsewhere_are_refused(folder: Path) -> None:
    content = metadata_of(folder)
    next(iter(content.storage_data.values())).relative_path = "../other.distcp"
    (folder / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"names '\.\./other\.distcp', which is not in the folder"):
        load_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))])
def test_what_is_no_metadata_is_refused_in_one_line(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"sharded/\.metadata: "):
        load_metadata(folder)
    (folder / METADATA).unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_metadata(folder)
