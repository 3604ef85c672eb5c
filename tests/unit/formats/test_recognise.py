"""A path without a model of ours is called by its name, whoever opens it."""

from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.export.source import open_source
from bitnet_train.formats.recognise import what_it_is
from bitnet_train.model.pretrained import source_folder


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "the folder is empty"),
        (["notes.txt"], "nothing in it is known here"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "it is a PEFT adapter, which needs its base model; merge",
        ),
        (["model.safetensors", "tokenizer.json"], "it is weights without config.json; add the config.json"),
        (["pytorch_model.bin"], "it is weights in a pickle, without config.json; save the model again"),
        (["tokenizer.json", "tokenizer_config.json"], "it is a tokenizer alone; give the model's folder"),
        (["a.gguf", "b.gguf"], "it is a folder of GGUF files; give one of the files"),
        (["multirun.yaml", "0/status.json"], "it is the directory of a sweep; give one of the runs in it"),
        (
            ["snapshots/abc/config.json", "refs/main"],
            "it is a folder of the hub's cache; give the folder under snapshots/",
        ),
        (["checkpoints/step-1/state.pt"], "it is the directory of a run that has not finished; let it end"),
        (["consolidated.00.pth", "params.json"], "it is weights as Meta or Mistral publish them; convert them"),
        (["dataset_info.json", "state.json"], "it is a data set; give a model"),
        (["model_index.json"], "it is a diffusers pipeline"),
        (["one/config.json", "two/config.json"], "it is a folder of models; give one of them, such as "),
    ],
)
def test_what_a_folder_is(tmp_path: Path, files: list[str], told: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert what_it_is(folder).startswith(told)
    with pytest.raises(UserError, match=r"has no config\.json or model/config\.json: "):
        open_source(folder)
    with pytest.raises(UserError, match=r"no model there; give a run directory"):
        source_folder(str(folder), "SRC")


def test_what_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert what_it_is(tmp_path / "model.safetensors") == "it is a file of weights; give the folder that it is in"
    (tmp_path / "notes").touch()
    assert what_it_is(tmp_path / "notes").startswith("it is a file that is no GGUF")
    assert what_it_is(tmp_path / "none") == "there is no such folder"
