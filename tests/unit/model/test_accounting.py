"""Nothing in a stored model is overlooked: it is used, left out for a reason, or refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.source import open_source
from bitnet_train.formats.hf_folder import quantization_config
from bitnet_train.model.pretrained import load_for_inference, load_for_training
from bitnet_train.model.start import start_from, starting_config
from tests.folders import edit_config, edit_tensor, write_master

HEAD, EMBEDDING, ROTARY = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(params=["master", "packed"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_master(tmp_path / "master")
    if request.param == "packed":
        export(tmp_path / "master", tmp_path / "packed")
    folder: Path = tmp_path / request.param
    return folder


def test_sizes_that_no_tensor_has_are_refused_before_anything_is_built(stored: Path) -> None:
    """Were the decoder built first, the test would not end, or have no memory."""
    for fields, tensor in [
        ({"num_hidden_layers": 10**9}, "model.layers.2.mlp.down_proj.weight"),
        ({"hidden_size": 2**40, "num_attention_heads": 2**33}, EMBEDDING),
        ({"vocab_size": 10**12}, EMBEDDING),
        ({"intermediate_size": 10**7}, "model.layers.0.mlp.down_proj.weight"),
        ({"num_attention_heads": 10**9, "hidden_size": 2 * 10**9}, EMBEDDING),
    ]:
        folder = shutil.copytree(stored, stored.with_name("odd"), dirs_exist_ok=True)
        edit_config(folder, **fields)
        refused(folder, f"tensor {tensor} must have shape .*; the weights do not fit config.json")


def refused(folder: Path, message: str) -> None:
    """Every way in refuses the folder."""
    with pytest.raises(UserError, match=message):
        load_for_inference(folder)
    with pytest.raises(UserError, match=message):
        open_source(folder)
    if folder.name == "master":
        with pytest.raises(UserError, match=message):
            load_for_training(folder)
        with pytest.raises(UserError, match=message):
            start_from(folder, starting_config(folder))


def test_another_head_is_refused_where_the_embedding_serves_as_head(stored: Path) -> None:
    """transformers computes the logits with it, whatever config.json says."""
    embedding = load_file(stored / "model.safetensors")[EMBEDDING]
    edit_tensor(stored, HEAD, torch.randn_like(embedding))
    refused(stored, r"lm_head\.weight must be model\.embed_tokens\.weight .* set tie_word_embeddings to false")
    edit_tensor(stored, HEAD, embedding.clone())
    load_for_inference(stored)
    source = open_source(stored)
    assert source.tensors_left_out == {HEAD: "the embedding, stored twice"}


def test_computed_tensors_are_left_out_and_unknown_ones_refused(stored: Path) -> None:
    edit_tensor(stored, ROTARY, torch.ones(32))
    load_for_inference(stored)
    assert open_source(stored).tensors_left_out == {ROTARY: "computed from config.json"}
    edit_tensor(stored, "model.layers.0.self_attn.q_proj.lora_A", torch.ones(4, 128))
    for opened in (load_for_inference, open_source):
        with pytest.raises(UserError, match="lora_A"):
            opened(stored)


def test_a_tensor_of_a_gguf_file_without_a_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequency factors, which ik_llama.cpp and llama.cpp would compute with."""
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f32")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"blk.1.attn_sub_norm.weight", b"rope_freqs.weight000000000"))
    with pytest.raises(UserError, match=r"rope_freqs.* has no place in a BitNet"):
        load_for_inference(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (["lm_head", "model.layers.1.mlp.up_proj"], "it names model.layers.1.mlp.up_proj"),
        (["lm_head", r"model\.layers\..*\.k_proj"], "it names model.layers.0.self_attn.k_proj"),
        (["lm_head", "layers.0"], None),  # matches from the start of a name, or its end: none
        (["lm_head", "o_proj"], "it names model.layers.0.self_attn.o_proj"),
        ([], "it does not name lm_head"),
        ("lm_head", ": must be a list or null, got a string"),
        (["lm_head", "("], "must hold regular expressions"),
        (["lm_head", "model.embed_tokens"], None),
        (None, None),
    ],
)
def test_modules_that_transformers_leaves_as_floats(stored: Path, modules: object, told: str | None) -> None:
    kind = ("autobitlinear", "online" if stored.name == "master" else "offline")
    edit_config(stored, quantization_config={**quantization_config(*kind), "modules_to_not_convert": modules})
    if told is None:
        load_for_inference(stored)
        open_source(stored)
        return
    refused(stored, rf"quantization_config\.modules_to_not_convert.*{re.escape(told)}")


def test_the_names_are_those_that_transformers_matches() -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    from bitnet_train.model.accounting import _matches

    names = ["lm_head", *(f"model.layers.{n}.mlp.up_proj" for n in (1, 11))]
    for patterns in (
        ["lm_head"],
        ["model.layers.1"],
        ["model.layers.1."],
        ["up_proj"],
        ["a|lm_head"],
        ["layers.1.mlp"],
        [""],
    ):
        for name in names:
            assert _matches("", name, patterns) == (not utils.should_convert_module(name, patterns)), (patterns, name)


def test_a_master_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(tmp_path / "master" / "model.safetensors")[name]
    weight[3, 4] = torch.nan
    edit_tensor(tmp_path / "master", name, weight)
    for opened in (load_for_inference, load_for_training):
        with pytest.raises(UserError, match=r"up_proj\.weight: every value must be finite, got 1 that are not"):
            opened(tmp_path / "master")


@pytest.mark.parametrize("stored_scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_a_scale_that_is_no_number_above_0_is_refused(tmp_path: Path, stored_scale: float, linear_class: str) -> None:
    """Of 1e-40 the reciprocal is infinity."""
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "packed", linear_class=linear_class, dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensor(tmp_path / "packed", name, torch.tensor([stored_scale]))
    if (stored_scale, linear_class) == (1e-40, "autobitlinear"):
        load_for_inference(tmp_path / "packed")
        return
    with pytest.raises(UserError, match=rf"{name}: the scale of the matrix must be finite and above 0, got "):
        load_for_inference(tmp_path / "packed")
    with pytest.raises(UserError, match=rf"{name}: the scale of the matrix must be finite and above 0, got "):
        export(tmp_path / "packed", tmp_path / "out.gguf", format="gguf")
    assert not (tmp_path / "out.gguf").exists()
