"""Model folders: what they are, read tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import HFFolder, folder_kind
from bitnet_train.formats.json_file import read_json, write_json


def write_config(folder: Path, **quantization: str | None) -> None:
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


@pytest.mark.parametrize(
    "quantization",
    [
        {},
        {"linear_class": None, "quantization_mode": None},
        {"linear_class": "bitlinear", "quantization_mode": "offline"},
    ],
)
def test_the_layout_that_stores_the_inverse_scale_is_what_transformers_takes_by_default(
    tmp_path: Path, quantization: dict[str, str]
) -> None:
    write_config(tmp_path, quant_method="bitnet", **quantization)
    assert folder_kind(tmp_path) == "packed"
    assert HFFolder(tmp_path).inverse_scale
    write_config(tmp_path, quant_method="bitnet", linear_class="autobitlinear")
    assert folder_kind(tmp_path) == "packed"
    assert not HFFolder(tmp_path).inverse_scale


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'bitnet', got"),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "got bitlinear, online"),
        ({"quant_method": "bitnet", "linear_class": "other"}, "got other, offline"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm must be false"),
    ],
)
def test_other_quantisations_are_refused(tmp_path: Path, quantization: dict[str, str], message: str) -> None:
    write_config(tmp_path, **quantization)
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
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


def test_one_file_is_read_by_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    folder = HFFolder(tmp_path)
    assert list(folder.tensors) == ["w"]
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
