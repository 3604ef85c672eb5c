"""Starting a BitNet from dense models that transformers wrote: every tensor, the configuration, and the function."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import HFFolder
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.rope import RopeScaling
from bitnet_train.model.skeleton import own_rows
from bitnet_train.model.start import start_from, starting_config
from tests.folders import edit_config, edit_tensor, write_master
from tests.parity.reference import randomize, relative
from tests.support import DENSE

transformers = pytest.importorskip("transformers")

SHAPE = {**DENSE, "vocab_size": 301, "initializer_range": 0.1}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA_3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "llama-mha-bias": ("Llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def write_dense(folder: Path, name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A folder as transformers saves a random model of MODELS, biases and gains too; returns the model."""
    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **own, **fields})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    randomize(model)
    model.to(dtype).save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_copied(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    dense = write_dense(tmp_path, name, dtype)
    model, report = start_from(tmp_path, starting_config(tmp_path))
    tensors, stored = dict(model.named_parameters()), dict(dense.named_parameters())
    assert set(report.copied) == stored.keys()
    for key in report.copied:
        assert tensors[key].dtype == torch.float32
        assert torch.equal(tensors[key], stored[key].float())
    assert set(report.copied) | set(report.initialised) == tensors.keys()
    inserted = [key for key in report.initialised if "sub_norm" in key]
    assert len(inserted) == 4
    assert all(tensors[key].eq(1).all() for key in inserted)
    biases = set(report.initialised) - set(inserted)
    assert len(biases) == (2 if name == "qwen2" else 0)
    assert all(tensors[key].eq(0).all() for key in biases)
    assert report.left_out == []


@pytest.mark.parametrize("quantize", [False, True], ids=["dense twin", "warm-up at 0"])
@pytest.mark.parametrize("name", MODELS)
def test_unquantised_it_is_the_dense_model_with_sub_norms(tmp_path: Path, name: str, quantize: bool) -> None:
    dense = write_dense(tmp_path, name).eval()
    config = starting_config(tmp_path)
    assert config.quantize
    assert config.hidden_act == "silu"

    def sub_norm(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return F.rms_norm(args[0], args[0].shape[-1:], eps=config.rms_norm_eps)

    for key, module in dense.named_modules():
        if key.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(sub_norm)
    model, _ = start_from(tmp_path, BitNetConfig(**{**vars(config), "quantize": quantize}))
    ids = torch.randint(0, 301, (2, 200))
    with torch.no_grad():
        expected = dense(ids).logits
        if quantize:
            assert relative(model(ids), expected) > 0.1
            for module in model.modules():
                if isinstance(module, BitLinear):
                    module.strength = 0.0
        assert relative(model(ids), expected) < 1e-4


def test_the_configuration_comes_along(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama-3", attention_dropout=0.1)
    assert starting_config(tmp_path) == BitNetConfig(
        **SHAPE,  # type: ignore[arg-type]
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )


def test_defaults_where_config_json_is_silent(tmp_path: Path) -> None:
    sizes = {name: SHAPE[name] for name in SHAPE if name not in ("num_key_value_heads", "initializer_range")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    expected = transformers.LlamaConfig(**sizes)
    config = starting_config(tmp_path)
    for name in ("rms_norm_eps", "num_key_value_heads", "initializer_range", "tie_word_embeddings", "attention_bias"):
        assert getattr(config, name) == getattr(expected, name)
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    edit_config(tmp_path, hidden_size=None)
    with pytest.raises(UserError, match="hidden_size must be set"):
        starting_config(tmp_path)


def test_shards(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "whole", "llama")
    dense.save_pretrained(tmp_path / "shards", max_shard_size="100KB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, _ = start_from(tmp_path / "whole", starting_config(tmp_path / "whole"))
    shards, _ = start_from(tmp_path / "shards", starting_config(tmp_path / "shards"))
    for got, want in zip(shards.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


def test_the_report_can_be_read(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama-3")
    tensors = HFFolder(tmp_path)
    edit_tensor(tmp_path, "lm_head.weight", tensors.load("model.embed_tokens.weight"))
    edit_tensor(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    _, report = start_from(tmp_path, starting_config(tmp_path))
    lines = str(report).splitlines()
    assert lines[0] == f"start from {tmp_path} (llama)"
    assert lines[1].startswith(
        "copied: 20 tensors: model.embed_tokens.weight, model.layers.*.self_attn.q_proj.weight x 2"
    )
    assert "4 tensors: model.layers.*.self_attn.attn_sub_norm.weight x 2" in lines[2]
    assert lines[3] == (
        "left out (tied or computed): 2 tensors: lm_head.weight, model.layers.*.self_attn.rotary_emb.inv_freq"
    )
    assert "hidden_act silu" in lines[4]
    assert "'rope_type': 'llama3'" in lines[4]
    assert lines[5] == "linear layers: ternary"


def test_a_dense_twin_becomes_ternary(tmp_path: Path) -> None:
    write_master(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    config = starting_config(tmp_path)
    assert not config.quantize
    model, _ = start_from(tmp_path, BitNetConfig(**{**vars(config), "quantize": True}))
    assert any(isinstance(module, BitLinear) for module in model.modules())


def test_masters_of_a_bitnet_start_as_they_are(tmp_path: Path) -> None:
    trained = write_master(tmp_path)
    model, report = start_from(tmp_path, starting_config(tmp_path))
    assert report.initialised == report.left_out == []
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(key))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"head_dim": 32}, "head_dim must be hidden_size / num_attention_heads (16) in a BitNet, got 32"),
        ("llama", {"mlp_bias": True}, "mlp_bias must be false"),
        ("llama", {"rms_norm_eps": "small"}, "config.json: rms_norm_eps: must be a number or null, got a string"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be one of relu2, silu, got 'gelu'"),
        ("mistral", {"sliding_window": 100}, "sliding_window of 100"),
        ("llama-3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
    ],
)
def test_models_that_a_bitnet_cannot_be(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    write_dense(tmp_path, name)
    edit_config(tmp_path, **fields)
    with pytest.raises(UserError) as error:
        start_from(tmp_path, starting_config(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_that_no_context_exceeds_is_none(tmp_path: Path) -> None:
    write_dense(tmp_path, "mistral", sliding_window=100)
    config = BitNetConfig(**{**vars(starting_config(tmp_path)), "max_position_embeddings": 100})
    assert start_from(tmp_path, config)[0].config == config


def test_tensors_without_a_place_and_missing_ones_are_refused(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama-mha-bias")
    edit_config(tmp_path, attention_bias=False)
    with pytest.raises(UserError, match=r"self_attn.k_proj.bias has no place in this BitNet \(attention_bias False"):
        start_from(tmp_path, starting_config(tmp_path))
    edit_config(tmp_path, attention_bias=True)
    edit_tensor(tmp_path, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(UserError, match=r"'model.layers.1.mlp.up_proj.weight' is missing"):
        start_from(tmp_path, starting_config(tmp_path))


def test_codes_are_no_start(tmp_path: Path) -> None:
    write_master(tmp_path)
    offline = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    edit_config(tmp_path, quantization_config=offline)
    with pytest.raises(UserError, match="holds packed ternary weights, which cannot be trained"):
        starting_config(tmp_path)


def test_a_changed_size_is_refused(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama")
    config = BitNetConfig(**{**vars(starting_config(tmp_path)), "num_key_value_heads": 1})
    with pytest.raises(UserError, match=r"model.num_key_value_heads must be 2, as in .*, got 1; leave it out"):
        start_from(tmp_path, config)


@pytest.mark.parametrize("name", ["llama", "bitnet"])
def test_the_vocabulary_may_grow_and_not_shrink(tmp_path: Path, name: str) -> None:
    """A tokenizer with a token more than the embedding; own_rows is what ranks with shards do."""
    if name == "bitnet":
        write_master(tmp_path)
    else:
        write_dense(tmp_path, name)
    stored = starting_config(tmp_path)
    config = replace(stored, vocab_size=stored.vocab_size + 3)
    kept, _ = start_from(tmp_path, stored)
    grown, report = start_from(tmp_path, config)
    assert "added to the vocabulary: 3 rows, drawn anew" in str(report)
    for key, parameter in kept.named_parameters():
        assert torch.equal(grown.get_parameter(key)[: len(parameter)], parameter)
    added = grown.model.embed_tokens.weight[stored.vocab_size :]
    assert 0 < added.std() < 2 * config.initializer_range
    with own_rows(lambda length: range(length // 2, length)):
        half, _ = start_from(tmp_path, config)
    rows = half.model.embed_tokens.weight
    whole = kept.model.embed_tokens.weight
    assert torch.equal(rows[len(rows) // 2 : len(whole)], whole[len(rows) // 2 :])
    with pytest.raises(UserError, match=r"model.vocab_size must be at least \d+, as in .*; leave it out"):
        start_from(tmp_path, replace(stored, vocab_size=stored.vocab_size - 1))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3", None])
def test_another_type_names_those_that_can_be_started_from(tmp_path: Path, model_type: object) -> None:
    write_dense(tmp_path, "llama")
    edit_config(tmp_path, model_type=model_type)
    with pytest.raises(UserError, match="must be one of bitnet, llama, mistral, qwen2 to start from, got"):
        starting_config(tmp_path)


def test_a_damaged_bitnet_does_not_pass_for_a_dense_model(tmp_path: Path) -> None:
    write_master(tmp_path)
    edit_tensor(tmp_path, "model.layers.1.mlp.ffn_sub_norm.weight", None)
    with pytest.raises(UserError, match=r"ffn_sub_norm.weight' is missing"):
        start_from(tmp_path, starting_config(tmp_path))
