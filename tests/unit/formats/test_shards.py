"""States in shards, as a process that has no others reads them; tests/parallel writes them with several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from bitnet_train.errors import UserError
from bitnet_train.formats.shards import fill, mapped, outline, split

WEIGHT = torch.arange(6.0).view(3, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with one tensor."""
    save({"model/w": WEIGHT}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    return tmp_path


def state(name: str) -> dict[str, Any]:
    return {"model": {"w": f"shards:{name}"}, "step": 3, "optimizer": {"state": {0: [torch.ones(2)]}}}


def test_marks_are_filled_with_tensors_and_the_rest_stays(folder: Path) -> None:
    filled = fill(state("model/w"), folder)
    assert torch.equal(filled["model"]["w"], WEIGHT)
    assert filled["step"] == 3
    assert torch.equal(filled["optimizer"]["state"][0][0], torch.ones(2))


def test_an_outline_has_shapes_and_no_values(folder: Path) -> None:
    weight = outline(state("model/w"), folder)["model"]["w"]
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 2), torch.float32, "meta")


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"must describe model/other"):
        fill(state("model/other"), folder)


def test_a_whole_state_needs_no_files(tmp_path: Path) -> None:
    whole = {"model": {"w": WEIGHT}, "ranks": [{"rng": WEIGHT}]}
    rest, tensors = split(whole)
    assert (rest, tensors) == (whole, {})
    assert fill(whole, tmp_path)["model"]["w"] is WEIGHT


def test_a_path_names_keys_and_numbers() -> None:
    assert mapped({"a": [1, {"b": 2}]}, lambda path, leaf: f"{path}={leaf}") == {"a": ["a/0=1", {"b": "a/1/b=2"}]}
