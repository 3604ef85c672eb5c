"""safetensors files as the library reads and writes them, by parts and by shards."""

import json
import os
import weakref
from functools import partial
from itertools import starmap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.parts import row_slices
from bitnet_train.formats.safetensors_file import (
    LazyTensors,
    TensorInfo,
    stored_tensors,
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
    write_safetensors(tmp_path / "w", starmap(LazyTensors.of, tensors.items()))
    loaded = load_file(tmp_path / "w")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "w", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_literal_header(tmp_path: Path) -> None:
    narrow, wide = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([1.0])
    write_safetensors(tmp_path / "w", [LazyTensors.of("a", narrow), LazyTensors.of("b", wide)])
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

    def part(name: str) -> dict[str, Tensor]:
        assert sum(reference() is not None for reference in alive) <= 6  # written, waiting, and being made
        tensor = torch.zeros(2)
        alive.append(weakref.ref(tensor))
        return {name: tensor}

    info = TensorInfo(torch.float32, (6,))
    tensors = [LazyTensors({f"w{i}": info}, [partial(part, f"w{i}")] * 3) for i in range(9)]
    write_safetensors(tmp_path / "w", tensors)
    assert len(alive) == 27


def test_tensors_that_are_made_together_lie_where_the_library_would_put_them(tmp_path: Path) -> None:
    infos = {"b": TensorInfo(torch.uint8, (2,)), "a": TensorInfo(torch.float32, (2,))}
    parts = [{"b": torch.tensor([i], dtype=torch.uint8), "a": torch.tensor([i / 2])} for i in range(2)]
    write_safetensors(tmp_path / "w", [LazyTensors(infos, [partial(dict, part) for part in parts])])
    save_file(
        {"b": torch.tensor([0, 1], dtype=torch.uint8), "a": torch.tensor([0, 0.5])}, tmp_path / "v", {"format": "pt"}
    )
    assert (tmp_path / "w").read_bytes() == (tmp_path / "v").read_bytes()


def test_a_large_tensor_is_read_by_blocks_of_rows(tmp_path: Path) -> None:
    tensor = torch.arange(5 * (1 << 21)).reshape(5, 1 << 21).to(torch.uint8)
    save_file({"w": tensor}, tmp_path / "w")
    stored = stored_tensors(tmp_path / "w")["w"]
    parts = [stored.rows(rows) for rows in row_slices(stored.shape)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), tensor)
    assert torch.equal(stored.load(), tensor)
    assert row_slices((1 << 23,)) == [slice(0, 1 << 22), slice(1 << 22, 1 << 23)]
    assert row_slices((2, 1 << 30)) == [slice(0, 1), slice(1, 2)]


def test_shards_are_cut_where_the_next_tensor_does_not_fit(tmp_path: Path) -> None:
    tensors = [LazyTensors.of(name, torch.full((size,), size * 1.0)) for name, size in (("a", 2), ("b", 2), ("c", 9))]
    write_weights(tmp_path, tensors, max_shard_bytes=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 52}, "weight_map": {"a": first, "b": first, "c": second}}
    assert load_file(tmp_path / first).keys() == {"a", "b"}
    assert load_file(tmp_path / second)["c"].tolist() == [9.0] * 9
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 16])
def test_a_tensor_can_be_read_as_soon_as_it_is_told(tmp_path: Path, max_shard_bytes: int) -> None:
    infos = {"b": TensorInfo(torch.uint8, (2,)), "a": TensorInfo(torch.float32, (2,))}
    parts = [{"b": torch.tensor([i], dtype=torch.uint8), "a": torch.tensor([i / 2])} for i in range(2)]
    together = LazyTensors(infos, [partial(dict, part) for part in parts])
    told: dict[str, list[float]] = {}

    def written(folder: Path, name: str) -> None:
        index = folder / "model.safetensors.index.json"
        file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
        told[name] = stored_tensors(folder / file)[name].load().tolist()

    write_weights(tmp_path, [together, LazyTensors.of("c", torch.full((3,), 2.0))], max_shard_bytes, written)
    assert told == {"b": [0, 1], "a": [0, 0.5], "c": [2, 2, 2]}


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_weights(tmp_path, [LazyTensors.of("a", torch.zeros(4))], max_shard_bytes=16)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dtype_that_is_not_read_here_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1, dtype=torch.int64)}, tmp_path / "w")
    with pytest.raises(UserError, match=r"w: w: dtype must be one of .* got I64"):
        _ = stored_tensors(tmp_path / "w")["w"].dtype


def test_a_file_that_is_cut_off_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(9)}, tmp_path / "w")
    stored = stored_tensors(tmp_path / "w")["w"]
    os.truncate(tmp_path / "w", stored.offset + 32)
    assert stored.rows(slice(0, 8)).tolist() == [0.0] * 8
    with pytest.raises(UserError, match=r"w: must have \d+ bytes, got \d+; copy it again"):
        stored.load()
