"""What an export of a tiny random model holds, in every format."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export, verify
from bitnet_train.export.source import open_source
from bitnet_train.export.targets import TARGETS, Target, readers, refusal
from bitnet_train.formats.gguf_file import GGUFFile
from bitnet_train.formats.packing import pack_ternary
from bitnet_train.quant import quantize_weight
from tests.folders import BOS, CODES, EOS, EOT, LINEARS, edit_tensor, write_master

MATRIX, GGUF_MATRIX = "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_packed_folder(master: Path, tmp_path: Path) -> None:
    result = export(master, tmp_path / "packed")
    masters, packed = load_file(master / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    codes, scale = quantize_weight(masters[MATRIX])
    assert torch.equal(packed[MATRIX], pack_ternary(codes))
    assert packed[MATRIX].dtype == torch.uint8
    assert torch.equal(packed[f"{MATRIX}_scale"], scale.bfloat16().reshape(1))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.ffn_sub_norm.weight"):
        assert torch.equal(packed[name], masters[name].bfloat16())
    assert len(packed) == len(masters) + LINEARS
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
    assert result.bytes == sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())


def test_files_of_a_packed_folder(master: Path, tmp_path: Path) -> None:
    export(master, tmp_path / "packed")
    config = config_of(tmp_path / "packed")
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    assert config["quantization_config"] == quantization
    assert config["torch_dtype"] == "bfloat16"
    ids = {
        token["content"]: token["id"] for token in json.loads((master / "tokenizer.json").read_text())["added_tokens"]
    }
    assert config["bos_token_id"] == ids[BOS]
    assert config["eos_token_id"] == ids[EOS]
    assert {**config_of(master), "quantization_config": 0}.items() <= {**config, "quantization_config": 0}.items()
    generation = json.loads((tmp_path / "packed" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[EOT]]}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (master / name).read_bytes()
    assert 'from_pretrained("packed"' in (tmp_path / "packed" / "README.md").read_text()


def test_a_packed_folder_of_float32_keeps_the_scale_exactly(master: Path, tmp_path: Path) -> None:
    export(master, tmp_path / "packed", dtype="float32")
    scale = quantize_weight(load_file(master / "model.safetensors")[MATRIX]).scale
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(packed[f"{MATRIX}_scale"], scale.reshape(1))
    assert packed["model.norm.weight"].dtype == torch.float32


def test_i2_s_file(master: Path, tmp_path: Path) -> None:
    result = export(master, tmp_path / "model.gguf", format="gguf")
    file = GGUFFile(tmp_path / "model.gguf")
    kinds = {name: file.kind(name).name for name in file.tensors}
    assert sum(kind == "I2_S" for kind in kinds.values()) == LINEARS
    assert kinds["token_embd.weight"] == "F16"
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert "output.weight" not in kinds
    assert file.metadata["general.file_type"] == 40
    assert file.metadata["general.name"] == "master"
    assert file.metadata["bitnet-b1.58.rope.freq_base"] == 10000.0
    assert file.metadata["bitnet-b1.58.rope.dimension_count"] == 64
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 304  # type: ignore[arg-type]
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
    assert result.notes == ()


@pytest.mark.parametrize(("type", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_files_hold_codes_times_scale(master: Path, tmp_path: Path, type: str, dtype: torch.dtype) -> None:
    result = export(master, tmp_path / "model.gguf", format="gguf", type=type)
    codes, scale = quantize_weight(load_file(master / "model.safetensors")[MATRIX])
    file = GGUFFile(tmp_path / "model.gguf")
    stored = torch.frombuffer(bytearray(file.read(GGUF_MATRIX)), dtype=dtype).reshape(codes.shape)
    assert torch.equal(stored, (codes * scale).to(dtype))
    assert file.kind("token_embd.weight").name == type.upper()
    assert file.kind("output_norm.weight").name == "F32"
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"


def test_master_folder_is_the_same_model(master: Path, tmp_path: Path) -> None:
    (master / "README.md").write_text("the card of the run")
    result = export(master, tmp_path / "copy", format="master")
    masters, copied = load_file(master / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in masters.items())
    assert config_of(tmp_path / "copy")["quantization_config"]["quantization_mode"] == "online"
    assert config_of(tmp_path / "copy")["torch_dtype"] == "float32"
    assert "## Card of the source\n\nthe card of the run" in (tmp_path / "copy" / "README.md").read_text()
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"


def test_masters_rounded_to_bfloat16_are_said_to_differ(master: Path, tmp_path: Path) -> None:
    """They are what was asked for: every master is the trained one rounded, and the other codes are counted."""
    result = export(master, tmp_path / "copy", format="master", dtype="bfloat16")
    verification = result.verification
    assert verification is not None
    assert verification.differ == 0
    assert 0 < verification.rounded < CODES / 100
    counts = f"{LINEARS} matrices, {CODES} codes, 0 differ"
    told = f"{verification.rounded} codes are others by the rounding of the masters"
    assert str(verification) == f"verified: {counts}; {told}"
    assert "float32 keeps every code" in result.notes[0]
    assert verify(master, tmp_path / "copy") == verification


def test_masters_of_bfloat16_export_exactly(tmp_path: Path) -> None:
    write_master(tmp_path / "master", dtype=torch.bfloat16)
    for target, format in (("model.gguf", "gguf"), ("packed", "safetensors"), ("copy", "master")):
        result = export(tmp_path / "master", tmp_path / target, format=format)
        assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
    assert config_of(tmp_path / "copy")["torch_dtype"] == "bfloat16"


def test_an_untied_head_is_written_where_readers_use_it(tmp_path: Path) -> None:
    write_master(tmp_path / "master", {"tie_word_embeddings": False})
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type="f16")
    assert GGUFFile(tmp_path / "model.gguf").tensors["output.weight"].shape == (304, 128)
    with pytest.raises(UserError, match=r"tie_word_embeddings must be true for i2_s, whose reader bitnet.cpp computes"):
        export(tmp_path / "master", tmp_path / "other.gguf", format="gguf")
    export(tmp_path / "master", tmp_path / "packed")
    assert "lm_head.weight" in load_file(tmp_path / "packed" / "model.safetensors")


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_a_packed_folder_becomes_gguf(master: Path, tmp_path: Path, linear_class: str) -> None:
    export(master, tmp_path / "packed", dtype="float32", linear_class=linear_class)
    result = export(tmp_path / "packed", tmp_path / "model.gguf", format="gguf")
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
    found = verify(master, tmp_path / "model.gguf")
    assert found.codes == CODES
    if linear_class == "autobitlinear":
        assert found.differ == 0
    else:
        assert found.differ <= LINEARS  # a scale that has been 1 / g may come back a unit in the last place away


def test_bitlinear_stores_the_inverse_scale(master: Path, tmp_path: Path) -> None:
    result = export(master, tmp_path / "packed", linear_class="bitlinear")
    scale = quantize_weight(load_file(master / "model.safetensors")[MATRIX]).scale
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(packed[f"{MATRIX}_scale"], (1 / scale).bfloat16().reshape(1))
    quantization = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    assert config_of(tmp_path / "packed")["quantization_config"] == quantization
    assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"


@pytest.mark.parametrize(
    "stored",
    [{}, {"dtype": "float32"}, {"linear_class": "bitlinear"}, {"format": "gguf"}, {"format": "gguf", "type": "bf16"}],
)
def test_what_was_exported_is_exported_again(master: Path, tmp_path: Path, stored: dict[str, Any]) -> None:
    export(master, tmp_path / "stored", **stored)
    codes = quantize_weight(load_file(master / "model.safetensors")[MATRIX]).codes
    for name, how in {"i2_s": {"format": "gguf"}, "f32": {"format": "gguf", "type": "f32"}, "packed": {}}.items():
        result = export(tmp_path / "stored", tmp_path / name, **how)  # type: ignore[arg-type]
        assert str(result.verification) == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"
        assert torch.equal(open_source(tmp_path / name).weights.ternary(MATRIX).codes, codes)
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    assert config_of(tmp_path / "packed")["rms_norm_eps"] == 1e-5


def test_a_gguf_file_is_copied_number_by_number(master: Path, tmp_path: Path) -> None:
    export(master, tmp_path / "a.gguf", format="gguf", name="a model", licence="mit")
    export(tmp_path / "a.gguf", tmp_path / "b.gguf", format="gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("type", "file_type"), [("tq1_0", 36), ("tq2_0", 37), ("i2_s", 40), ("f16", 1)])
def test_silu_models_have_the_architecture_of_llama_cpp(tmp_path: Path, type: str, file_type: int) -> None:
    write_master(tmp_path / "master", {"hidden_act": "silu", "hidden_size": 256})
    result = export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type=type)
    file = GGUFFile(tmp_path / "model.gguf")
    assert result.verification is not None
    assert result.verification.differ == 0
    assert file.metadata["general.architecture"] == "bitnet"
    assert file.metadata["bitnet.block_count"] == 2
    assert file.metadata["general.file_type"] == file_type
    assert file.kind(GGUF_MATRIX).name == type.upper()
    assert open_source(tmp_path / "model.gguf").config.hidden_act == "silu"


def test_weights_are_cut_into_shards(master: Path, tmp_path: Path) -> None:
    whole = export(master, tmp_path / "whole")
    result = export(master, tmp_path / "shards", max_shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert str(result.verification) == str(whole.verification)
    tensors = {name: tensor for file in files for name, tensor in load_file(tmp_path / "shards" / file).items()}
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    again = export(tmp_path / "shards", tmp_path / "model.gguf", format="gguf")
    assert str(again.verification) == str(whole.verification)


SPACE = list(itertools.product([2, 1], [False, True], [True, False], ["relu2", "silu"], ["float32", "bfloat16"]))


@pytest.mark.parametrize(("kv_heads", "bias", "tied", "act", "dtype"), SPACE)
def test_codes_and_scales_over_the_space_of_models(
    tmp_path: Path, kv_heads: int, bias: bool, tied: bool, act: str, dtype: str
) -> None:
    """Every target that takes the model holds quant.py's codes, and its scale rounded to the type that is stored."""
    fields: dict[str, int | str] = {
        "hidden_size": 256,
        "num_key_value_heads": kv_heads,
        "attention_bias": bias,
        "hidden_act": act,
    }
    write_master(tmp_path / "master", {**fields, "tie_word_embeddings": tied}, dtype=getattr(torch, dtype))
    source = open_source(tmp_path / "master")
    masters = load_file(tmp_path / "master" / "model.safetensors")
    targets = [target for target in TARGETS if refusal(source, target) is None]
    assert len(targets) == {(False, True, "relu2"): 7, (False, True, "silu"): 9, (False, False, "relu2"): 6}.get(
        (bias, tied, act), 2 if bias else 3
    )
    for number, target in enumerate(targets):
        how = {"gguf": {"type": target.variant}, "safetensors": {"linear_class": target.variant}, "master": {}}
        path = tmp_path / str(number)
        result = export(tmp_path / "master", path, format=target.format, **how[target.format])  # type: ignore[arg-type]
        assert result.verification is not None
        assert result.verification.differ == 0
        written = open_source(path)
        for name in source.ternary_names:
            (codes, scale), found = quantize_weight(masters[name]), written.weights.ternary(name)
            assert torch.equal(found.codes, codes), (target, name)
            assert found.scale.item() == pytest.approx(scale.item(), rel=2**-8), (target, name)


def test_a_run_directory_is_a_source(tmp_path: Path) -> None:
    write_master(tmp_path / "run" / "model")
    export(tmp_path / "run", tmp_path / "model.gguf", format="gguf")
    assert GGUFFile(tmp_path / "model.gguf").metadata["general.name"] == "run"


def test_what_travels_beside_the_weights(master: Path, tmp_path: Path) -> None:
    (master / "additional_chat_templates").mkdir()
    (master / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (master / "chat_template.jinja").write_text("{{ messages }}")
    (master / "vocab.json").write_text("{}")
    (master / "optimizer.pt").touch()
    result = export(master, tmp_path / "packed")
    assert result.notes == ("left out: optimizer.pt",)
    for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "vocab.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (master / name).read_bytes()
    assert result.bytes == sum(file.stat().st_size for file in (tmp_path / "packed").rglob("*") if file.is_file())
    gguf = export(master, tmp_path / "m.gguf", format="gguf")
    assert gguf.notes[-1] == "left out: optimizer.pt, vocab.json, chat template tool_use"


def test_a_tokenizer_of_sentencepiece_is_copied_unread(master: Path, tmp_path: Path) -> None:
    (master / "tokenizer.json").unlink()
    (master / "tokenizer.model").write_bytes(b"pieces")
    result = export(master, tmp_path / "packed")
    assert result.notes == ("there is no tokenizer.json; tokenizer.model was copied unread",)
    assert (tmp_path / "packed" / "tokenizer.model").read_bytes() == b"pieces"
    with pytest.raises(UserError, match=r"tokenizer\.json: must be there for GGUF, found none"):
        export(master, tmp_path / "m.gguf", format="gguf")


def test_a_model_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    write_master(tmp_path / "master", with_tokenizer=False)
    assert export(tmp_path / "master", tmp_path / "packed").notes == (
        "the model has no tokenizer; --tokenizer DIR adds one",
    )


SHAPES = [  # hidden size, heads, feed-forward size, activation, type, why not
    (
        128,
        2,
        130,
        "relu2",
        "f16",
        "the row length must be a multiple of 4 for ik_llama.cpp, .* got 130; use --type f32",
    ),
    (128, 2, 132, "relu2", "f16", None),
    (
        128,
        2,
        132,
        "relu2",
        "bf16",
        "the row length must be a multiple of 8 for ik_llama.cpp, .* got 132; use --type f32",
    ),
    (128, 2, 130, "relu2", "f32", None),
    (
        132,
        2,
        256,
        "relu2",
        "f32",
        r"hidden_size / num_attention_heads must be a multiple of 4 .*; use --format safetensors",
    ),
    (128, 2, 130, "silu", "f16", None),  # llama.cpp takes the rest into account
    (132, 2, 256, "silu", "bf16", None),
]


@pytest.mark.parametrize(("hidden", "heads", "wide", "act", "type", "reason"), SHAPES)
def test_rows_that_a_runtime_computes_wrong_are_refused(
    tmp_path: Path, hidden: int, heads: int, wide: int, act: str, type: str, reason: str | None
) -> None:
    """`--list` and the export give the same reason."""
    sizes: dict[str, int | str | bool] = {"hidden_size": hidden, "intermediate_size": wide}
    sizes |= {"num_attention_heads": heads, "hidden_act": act}
    write_master(tmp_path / "master", sizes)
    source, target = open_source(tmp_path / "master"), Target("gguf", type)
    if reason is None:
        export(tmp_path / "master", tmp_path / "m.gguf", format="gguf", type=type)
        assert readers(source, target) == (["llama.cpp"] if act == "silu" else ["ik_llama.cpp"])
        return
    with pytest.raises(UserError, match=reason):
        export(tmp_path / "master", tmp_path / "m.gguf", format="gguf", type=type)
    assert re.search(reason, refusal(source, target) or "")
    assert readers(source, target) == []


@pytest.mark.parametrize("how", [{"type": "f16"}, {"type": "tq2_0"}])
def test_a_scale_beyond_float16_is_refused_before_anything_is_written(tmp_path: Path, how: dict[str, str]) -> None:
    write_master(tmp_path / "master", {"hidden_size": 256, "hidden_act": "silu"})
    export(tmp_path / "master", tmp_path / "packed", dtype="float32")
    for scale in (1e-9, 1e6):
        edit_tensor(tmp_path / "packed", f"{MATRIX}_scale", torch.tensor([scale]))
        with pytest.raises(
            UserError, match=rf"{MATRIX}: the scale must be a number that float16 holds to 8 bits, got "
        ):
            export(tmp_path / "packed", tmp_path / "m.gguf", format="gguf", **how)  # type: ignore[arg-type]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["master", "packed"]
        export(tmp_path / "packed", tmp_path / "m.gguf", format="gguf", type="i2_s", force=True)
        (tmp_path / "m.gguf").unlink()


def test_a_shared_matrix_that_is_stored_twice_is_no_error(master: Path, tmp_path: Path) -> None:
    edit_tensor(master, "lm_head.weight", load_file(master / "model.safetensors")["model.embed_tokens.weight"])
    export(master, tmp_path / "packed")
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")


def test_a_matrix_of_zeros_keeps_its_codes(master: Path, tmp_path: Path) -> None:
    edit_tensor(master, MATRIX, torch.zeros(128, 256))
    for type in ("i2_s", "f16"):
        result = export(master, tmp_path / f"{type}.gguf", format="gguf", type=type)
        assert result.verification is not None
        assert result.verification.differ == 0
