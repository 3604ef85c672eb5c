"""Fields, keys and files that others left wrong: one line that says which, never a traceback, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.source import open_source
from bitnet_train.formats import gguf_file
from bitnet_train.formats.gguf_file import GGUFFile, LazyBlocks, write_gguf
from tests.folders import BOS, EOS, EOT, edit_config, edit_tensor, write_master

Edit = Callable[[dict[str, Any]], None]


def edited(path: Path, change: Edit) -> Path:
    """The GGUF file with other keys, beside it."""
    file = GGUFFile(path)
    metadata = dict(file.metadata)
    change(metadata)
    architecture = str(metadata.pop("general.architecture"))
    tensors = {
        name: LazyBlocks(file.kind(name), info.shape, [lambda name=name: file.read(name).data])  # type: ignore[misc]
        for name, info in file.tensors.items()
    }
    target = path.with_name("edited.gguf")
    write_gguf(target, architecture, metadata, tensors)
    return target


def put(key: str, value: object) -> Edit:
    return lambda metadata: metadata.update({key: value})


KEYS: dict[str, tuple[Edit, str]] = {
    "another width of positions": (put("bitnet-b1.58.rope.dimension_count", 32), "rope.dimension_count must be 64"),
    "a factor of attention": (put("bitnet-b1.58.rope.scaling.attn_factor", 3.0), "attn_factor must not be there"),
    "an older scale": (put("bitnet-b1.58.rope.scale_linear", 4.0), "scale_linear must not be there"),
    "a width of keys": (put("bitnet-b1.58.attention.key_length", 32), "key_length must not be there"),
    "a factor without a type": (put("bitnet-b1.58.rope.scaling.factor", 4.0), "scaling.type must be there"),
    "no tokens": (lambda m: m.pop("tokenizer.ggml.tokens"), "key tokenizer.ggml.tokens must be there"),
    "fewer tokens than rows": (lambda m: m["tokenizer.ggml.tokens"].pop(), "an entry for each of 304 rows"),
    "fewer types than tokens": (lambda m: m["tokenizer.ggml.token_type"].pop(), "an entry for each of 304 rows"),
    "one token twice": (lambda m: m["tokenizer.ggml.tokens"].__setitem__(3, "a"), "must differ from each other"),
    "types of text": (
        put("tokenizer.ggml.token_type", ["1"] * 304),
        r"tokenizer.ggml.token_type\[0\]: must be an integer, got a string",
    ),
    "BOS beyond the tokens": (
        put("tokenizer.ggml.bos_token_id", 5000),
        "bos_token_id must be an id below 304, got 5000",
    ),
    "EOS as text": (put("tokenizer.ggml.eos_token_id", "5"), "eos_token_id: must be an integer, got a string"),
    "BOS before the tokens": (put("tokenizer.ggml.bos_token_id", -1), "bos_token_id must be an id below 304, got -1"),
    "layers as text": (put("bitnet-b1.58.block_count", "2"), "block_count: must be an integer, got a string"),
    "layers with a fraction": (put("bitnet-b1.58.block_count", 2.0), "block_count: must be an integer, got a number"),
    "a billion layers": (
        put("bitnet-b1.58.block_count", 10**9),
        "tensor model.layers.2.mlp.down_proj.weight must have",
    ),
    "rows without tensors": (put("bitnet-b1.58.vocab_size", 10**12), "tensor model.embed_tokens.weight must"),
    "a linear scaling without a factor": (
        lambda m: m.update({"bitnet-b1.58.rope.scaling.type": "linear"}),
        "rope_scaling.factor must be set for rope_type 'linear'",
    ),
    "positions beyond float32": (
        put("bitnet-b1.58.rope.freq_base", float("inf")),
        "rope.freq_base: must be a number <=",
    ),
    "a template that is a number": (
        put("tokenizer.chat_template", 5),
        "chat_template: must be a string, got an integer",
    ),
    "merges of nothing": (put("tokenizer.ggml.merges", ["zz qq"]), "tokenizer.ggml.merges: "),
    "merges of three": (put("tokenizer.ggml.merges", ["a b c"]), "tokenizer.ggml.merges: "),
    "other cuts": (put("tokenizer.ggml.pre", "tekken"), "tokenizer.ggml.pre must be one of"),
    "EOS behind every text": (put("tokenizer.ggml.add_eos_token", value=True), "add_eos_token must be false"),
}


@pytest.mark.parametrize("what", KEYS)
def test_keys_that_say_something_else_are_refused(tmp_path: Path, what: str) -> None:
    change, message = KEYS[what]
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "m.gguf", format="gguf", type="f32")
    source = edited(tmp_path / "m.gguf", change)
    for target, format in (("out", "safetensors"), ("out.gguf", "gguf")):
        with pytest.raises(UserError, match=rf"edited\.gguf: .*{message}"):
            export(source, tmp_path / target, format=format)
        assert not (tmp_path / target).exists()


def test_keys_without_a_place_are_named(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "m.gguf", format="gguf", type="f32")
    more = {"general.author": "me", "tokenizer.ggml.scores": [0.5] * 304, "tokenizer.ggml.seperator_token_id": 2**40}
    source = edited(tmp_path / "m.gguf", lambda metadata: metadata.update(more))
    told = export(source, tmp_path / "out").accounts[-1]
    assert told.endswith("; left out: general.author, tokenizer.ggml.scores, tokenizer.ggml.seperator_token_id")
    copied = export(source, tmp_path / "copy.gguf", format="gguf", type="f32")
    assert copied.accounts[-1].endswith("; left out: general.author")
    metadata = GGUFFile(tmp_path / "copy.gguf").metadata
    assert metadata["tokenizer.ggml.scores"] == more["tokenizer.ggml.scores"]


def test_roles_may_be_in_the_older_file_alone(tmp_path: Path) -> None:
    """Training reads special_tokens_map.json, and so does the export."""
    write_master(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    roles = {"bos_token": EOT, "eos_token": {"content": BOS, "lstrip": False}, "pad_token": EOS}
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps(roles))
    source = open_source(tmp_path / "model")
    ids = source.tokenizer.generation_ids()
    trained = source.trained_tokenizer
    assert ids["bos_token_id"] == trained.bos_token_id == 292
    assert (ids["eos_token_id"], trained.stop_token_ids) == ([290, 292], (290, 292))
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    assert open_source(tmp_path / "m.gguf").trained_tokenizer.stop_token_ids == trained.stop_token_ids


def test_stop_ids_go_along_as_far_as_there_are_keys(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": [291, 292, 7]}')
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    assert open_source(tmp_path / "m.gguf").trained_tokenizer.stop_token_ids == (291, 292, 7)
    export(tmp_path / "m.gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [291, 292, 7]
    generation.write_text('{"eos_token_id": [291, 292, 7, 8]}')
    with pytest.raises(UserError, match=r"at most 3 ids may end a generation for GGUF, .* got 4, 8 among them"):
        export(tmp_path / "model", tmp_path / "other.gguf", format="gguf")


def test_the_token_that_closes_an_answer_is_a_stop(tmp_path: Path) -> None:
    """Our generation ends at it, whatever generation_config.json says."""
    write_master(tmp_path / "model")
    config = {"bos_token": BOS, "eos_token": EOS}
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
    text = (tmp_path / "model" / "tokenizer.json").read_text().replace(EOT, "<end_of_turn>")
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    config["chat_template"] = template.replace(EOT, "<end_of_turn>")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "generation_config.json").read_text())["eos_token_id"] == [291, 292]
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    assert GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.eot_token_id"] == 292


FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "a width of heads": ({"head_dim": 32}, "head_dim must be 64 in a BitNet, got 32"),
    "both ways": ({"is_causal": False}, "is_causal must be True in a BitNet, got False"),
    "a part of the positions": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    "windows": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be full_attention"),
    "a size with a fraction": (
        {"vocab_size": 304.0},
        "vocab_size: must be an integer or null, got a number; mend the file",
    ),
    "a truth value as text": (
        {"tie_word_embeddings": "false"},
        "tie_word_embeddings: must be true or false or null, got a string",
    ),
    "an id as text": ({"eos_token_id": "292"}, "eos_token_id: must be an integer or a list or null, got a string"),
    "an id as truth value": ({"bos_token_id": True}, "bos_token_id: must be an integer or a list or null, got true or"),
    "a mode that is none": (
        {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": {}}},
        "quantization_config.quantization_mode: must be a string or null, got an object",
    ),
}


@pytest.mark.parametrize("what", FIELDS)
@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_fields_of_another_function_or_type_are_refused(tmp_path: Path, what: str, format: str) -> None:
    fields, message = FIELDS[what]
    write_master(tmp_path / "model")
    edit_config(tmp_path / "model", **fields)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "model", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_the_length_that_positions_were_trained_with_may_stand_beside_the_scaling(tmp_path: Path) -> None:
    """transformers takes it from there, too."""
    write_master(tmp_path / "model")
    edit_config(
        tmp_path / "model", rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=16
    )
    scaling = open_source(tmp_path / "model").config.rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 16


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": {"lstrip": false}}', "eos_token: must have content"),
        (
            "tokenizer_config.json",
            '{"eos_token": ["x"]}',
            "eos_token: must be a string or an object or null, got a list",
        ),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "no text may hold half of a surrogate pair"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', r"chat_template\[0\]: must be an object, got a string"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: must be a string or a list or null"),
        ("special_tokens_map.json", '{"pad_token": 1}', "special_tokens_map.json: pad_token: must be a string"),
        ("tokenizer_config.json", "[" * 100_000, "is nested more than 100 levels deep"),
        ("tokenizer.json", '{"model": []}', "tokenizer.json: model: must be an object, got a list"),
        ("generation_config.json", '{"eos_token_id": [1.5]}', r"eos_token_id\[0\]: must be an integer, got a number"),
        ("config.json", "[" * 100_000, "is nested more than 100 levels deep"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: cannot be read as UTF-8"),
        ("README.md", b"\xff\xfe", "README.md: must be UTF-8"),
        ("generation_config.json", '{"x": "\\ud800"}', None),
    ],
)
def test_files_that_are_damaged_cost_one_line(
    tmp_path: Path, file: str, content: str | bytes, message: str | None
) -> None:
    write_master(tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if message is None:
        export(tmp_path / "model", tmp_path / "out")
        return
    with pytest.raises(UserError, match=message):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight_map", ["x", [1], None, {"lm_head.weight": 1}, {"lm_head.weight": ["x"]}])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_master(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: weight_map.*: must be .*; mend the file"):
        open_source(tmp_path / "model")


@pytest.mark.parametrize("name", ["a" * 10_000, "\0", "../config.json", ".", "", "x/model.safetensors", "\x1b[2J"])
def test_an_index_that_names_no_file_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_master(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: names .*, which is not in the folder"):
        open_source(tmp_path / "model")


def test_masters_of_several_types_keep_the_widest(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(tmp_path / "model", "model.embed_tokens.weight", embedding.half())
    result = export(tmp_path / "model", tmp_path / "copy", format="master")
    assert {tensor.dtype for tensor in load_file(tmp_path / "copy" / "model.safetensors").values()} == {torch.float32}
    assert result.verification is not None
    assert (result.verification.differ, result.verification.rounded) == (0, 0)


def test_an_embedding_that_would_become_zero_is_refused(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    embedding = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(tmp_path / "model", "model.embed_tokens.weight", embedding * 1e-9)
    with pytest.raises(UserError, match=r"embed_tokens\.weight: values must not all become 0 in F16"):
        export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    edit_tensor(tmp_path / "model", "model.norm.weight", torch.full((128,), 3.4e38))
    with pytest.raises(UserError, match=r"model: model\.norm\.weight: every value must be within the range"):
        export(tmp_path / "model", tmp_path / "packed")


def test_a_torn_line_of_metrics_and_text_among_them_are_left_out_of_the_card(tmp_path: Path) -> None:
    write_master(tmp_path / "run" / "model")
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "a": "text"}\n[1]\n{"step": 4, "los')
    assert "| step | 3 |" in export(tmp_path / "run", tmp_path / "out").card


def test_a_name_without_a_letter_is_refused_and_control_characters_go(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    with pytest.raises(UserError, match="--name must hold a letter"):
        export(tmp_path / "model", tmp_path / "out", name=" \x1b\n")
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf", name="a\x1b[31m b\n")
    assert GGUFFile(tmp_path / "m.gguf").metadata["general.name"] == "a [31m b"


def test_a_file_that_is_no_model_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "last").write_text("step-000002")
    with pytest.raises(UserError, match=r"last: must be a finished run's directory.* it is a file that is no GGUF"):
        open_source(tmp_path / "last")
    assert not gguf_file.is_gguf(tmp_path)


def test_another_tokenizer_brings_its_own_ids(tmp_path: Path) -> None:
    write_master(tmp_path / "model")
    write_master(tmp_path / "other")
    (tmp_path / "model" / "generation_config.json").write_text('{"pad_token_id": 7, "temperature": 0.5}')
    export(tmp_path / "model", tmp_path / "out", tokenizer=tmp_path / "other")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"temperature": 0.5, "bos_token_id": 290 + 0, "eos_token_id": [291, 292]}


def test_eos_is_the_tokenizers_where_the_configuration_has_several(tmp_path: Path) -> None:
    """As LLaMA-3.1's instruct models have it: three ids in config.json, the end of a turn in tokenizer_config.json."""
    write_master(tmp_path / "model")
    edit_config(tmp_path / "model", eos_token_id=[291, 5, 292], bos_token_id=290)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOT}))
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")] == [292, 291, 5]
    assert open_source(tmp_path / "m.gguf").trained_tokenizer.stop_token_ids == (292, 291, 5)
    export(tmp_path / "model", tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "generation_config.json").read_text())["eos_token_id"] == [291, 5, 292]


def test_a_tokenizer_without_bos_has_none_whatever_the_configuration_says(tmp_path: Path) -> None:
    """Qwen2's config.json names one."""
    write_master(tmp_path / "model")
    edit_config(tmp_path / "model", bos_token_id=290)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": EOS}))
    export(tmp_path / "model", tmp_path / "m.gguf", format="gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert "tokenizer.ggml.bos_token_id" not in metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is False
