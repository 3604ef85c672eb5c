"""safetensors files as the library reads and writes them, by parts and by shards."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.parts import rows_per_part
from bitnet_train.formats.safetensors_file import (
    LazyTensor,
    read_parts,
    tensor_dtype,
    write_safetensors,
    write_weights,
)


def test_written_tensors_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
        "a": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 3).t(),
        "é": torch.randn(1, 1, 1).half(),
        "none": torch.zeros(0, 4, dtype=torch.int8),
    }
    write_safetensors(tmp_path / "w", {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
    loaded = load_file(tmp_path / "w")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "w", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_literal_header(tmp_path: Path) -> None:
    narrow, wide = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([1.0])
    write_safetensors(tmp_path / "w", {"a": LazyTensor.of(narrow), "b": LazyTensor.of(wide)})
    data = (tmp_path / "w").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    assert data[8 : 8 + size].rstrip(b" ") == (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    )
    assert data[8 + size :] == b"\x00\x00\x80\x3f\x01\x02\x03"


def test_few_parts_at_a_time_are_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for _ in range(3):
            assert sum(reference() is not None for reference in alive) <= 2  # the one that is written, and the last
            tensor = torch.zeros(2)
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    write_safetensors(tmp_path / "w", {f"w{i}": LazyTensor(torch.float32, (6,), parts) for i in range(5)})
    assert len(alive) == 15


def test_tensors_are_made_in_the_order_that_was_given(tmp_path: Path) -> None:
    made: list[str] = []

    def tensor(name: str, dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(dtype, (1,), lambda: [made.append(name) or torch.ones(1, dtype=dtype)])  # type: ignore[func-returns-value]

    write_safetensors(tmp_path / "w", {"b": tensor("b", torch.uint8), "a": tensor("a", torch.float32)})
    assert made == ["b", "a"]
    assert {name: value.item() for name, value in load_file(tmp_path / "w").items()} == {"a": 1.0, "b": 1}


def test_a_large_tensor_is_read_by_blocks_of_rows(tmp_path: Path) -> None:
    tensor = torch.arange(5 * (1 << 21)).reshape(5, 1 << 21).to(torch.uint8)
    save_file({"w": tensor}, tmp_path / "w")
    parts = list(read_parts(tmp_path / "w", "w"))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), tensor)
    assert rows_per_part((10**6,)) == 1 << 22
    assert rows_per_part((2, 1 << 30)) == 1


def test_shards_are_cut_where_the_next_tensor_does_not_fit(tmp_path: Path) -> None:
    tensors = {name: LazyTensor.of(torch.full((size,), size * 1.0)) for name, size in (("a", 2), ("b", 2), ("c", 9))}
    write_weights(tmp_path, tensors, max_shard_bytes=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 52}, "weight_map": {"a": first, "b": first, "c": second}}
    assert load_file(tmp_path / first).keys() == {"a", "b"}
    assert load_file(tmp_path / second)["c"].tolist() == [9.0] * 9
    assert not (tmp_path / "model.safetensors").exists()


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": LazyTensor.of(torch.zeros(4))}, max_shard_bytes=16)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dtype_that_is_not_read_here_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1, dtype=torch.int64)}, tmp_path / "w")
    with pytest.raises(UserError, match=r"w: w: dtype must be one of .* got I64"):
        tensor_dtype(tmp_path / "w", "w")
