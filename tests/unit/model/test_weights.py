"""Stored models for inference: every kind of file gives the function that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.generate import complete
from bitnet_train.model.bitlinear import TernaryLinear
from bitnet_train.model.pretrained import load_for_inference, source_folder
from bitnet_train.model.skeleton import skeleton, tensor_shapes
from tests.folders import LINEARS, edit_tensor, write_master


@pytest.mark.parametrize(
    ("how", "kl"),
    [
        ({"dtype": "float32"}, 0.0),
        ({"dtype": "float32", "linear_class": "bitlinear"}, 1e-4),
        ({}, 1e-3),
        ({"format": "gguf"}, 1e-3),
        ({"format": "gguf", "type": "f32"}, 0.0),
    ],
)
def test_an_export_computes_the_trained_function(tmp_path: Path, how: dict[str, Any], kl: float) -> None:
    trained = write_master(tmp_path / "master")
    target = tmp_path / ("out.gguf" if "format" in how else "out")
    export(tmp_path / "master", target, **how)
    loaded = load_for_inference(source_folder(str(target), "SRC"))
    assert sum(isinstance(module, TernaryLinear) for module in loaded.modules()) == LINEARS
    ids = torch.randint(0, 290, (2, 32))
    with torch.no_grad():
        ours, theirs = trained(ids).log_softmax(-1), loaded(ids).log_softmax(-1)
    found = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert abs(found) <= max(kl, 1e-5)  # a last bit, another int8 code: it depends on the processor


def test_a_gguf_file_generates(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f32")
    texts = []
    for source in (tmp_path / "master", tmp_path / "model.gguf"):
        model, tokenizer = load_for_inference(source), Tokenizer.from_folder(source)
        texts.append(complete(model, tokenizer, "small", chat=True, max_new_tokens=8))
    assert texts[0] == texts[1]


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "packed")
    edit_tensor(tmp_path / "packed", "model.norm.weight", torch.zeros(7))
    with pytest.raises(UserError, match=r"packed: tensor model\.norm\.weight must have shape \(128,\), got \(7,\)"):
        load_for_inference(tmp_path / "packed")


def test_a_skeleton_has_the_shapes_and_draws_nothing(tmp_path: Path) -> None:
    model = write_master(tmp_path / "master")
    state = torch.get_rng_state()
    empty = skeleton(model.config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert tensor_shapes(empty) == tensor_shapes(model)
