"""Model folders: what they are, read tensor by tensor, written as the safetensors library reads them."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import HFFolder, LazyTensor, folder_kind, read_json, write_json, write_safetensors


def write_config(folder: Path, **quantization: str) -> None:
    config = {"model_type": "bitnet", "quantization_config": quantization or None}
    (folder / "config.json").write_text(json.dumps(config))


def test_kinds(tmp_path: Path) -> None:
    assert folder_kind(tmp_path) == "none"
    write_config(tmp_path)
    assert folder_kind(tmp_path) == "dense"
    write_config(tmp_path, quant_method="bitnet", linear_class="autobitlinear", quantization_mode="online")
    assert folder_kind(tmp_path) == "master"
    write_config(tmp_path, quant_method="bitnet", linear_class="autobitlinear", quantization_mode="offline")
    assert folder_kind(tmp_path) == "packed"


def test_the_layout_that_stores_the_inverse_scale_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, quant_method="bitnet", linear_class="bitlinear", quantization_mode="offline")
    with pytest.raises(UserError, match=r"config\.json: .*linear_class autobitlinear.* got "):
        folder_kind(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null", "\x00"])
def test_damaged_json_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: must "):
        read_json(tmp_path / "config.json")


def test_missing_json_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "config.json")


def test_json_keeps_its_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"template": "é {{ x }}", "list": [1]})
    assert read_json(tmp_path / "a.json") == {"template": "é {{ x }}", "list": [1]}


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


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def load() -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1  # the one that was written last
        tensor = torch.zeros(2)
        alive.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "w", {f"w{i}": LazyTensor(torch.float32, (2,), load) for i in range(5)})
    assert len(alive) == 5


def test_one_file_is_read_by_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    folder = HFFolder(tmp_path)
    assert list(folder.files) == ["w"]
    assert folder.shape("w") == (2, 3)
    assert folder.load("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UserError, match="tensor 'v' is missing"):
        folder.load("v")


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    folder = HFFolder(tmp_path)
    assert folder.load("a").tolist() == [0]
    assert folder.load("b").tolist() == [1, 1]


@pytest.mark.parametrize("name", ["missing.safetensors", "../outside.safetensors"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "folder" / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(UserError, match="which is not in the folder"):
        HFFolder(tmp_path / "folder").load("a")


def test_a_folder_without_weights_or_with_damaged_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found neither"):
        HFFolder(tmp_path).load("a")
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"", b"nonsense" * 4, data[:-8]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors: must be a whole safetensors file"):
            HFFolder(tmp_path).load("a")
