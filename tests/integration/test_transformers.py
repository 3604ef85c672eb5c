"""transformers computes with an exported folder what was trained.

Whole models are compared by KL: rounding is chaotic, a difference in the last place grows into another int8 code.
Greedy text is compared on a model that has learnt something: a random one's likeliest tokens are nearly ties.
"""

from pathlib import Path

import pytest
import torch

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.export import export
from bitnet_train.export.runtimes import agreement, compare, take_sample, transformers_logits
from bitnet_train.export.source import open_source
from bitnet_train.generate import generate
from bitnet_train.model.pretrained import load_for_inference
from tests.folders import BOS, TEXT, write_master
from tests.integration.conftest import SHAPE, Trained

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers loads no quantised model without it


@pytest.mark.runtime
@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"hidden_act": "silu"}, {"attention_bias": True}]
)
@pytest.mark.parametrize(
    ("format", "linear_class", "dtype", "bound"),
    [
        ("master", "autobitlinear", "float32", 1e-4),
        ("safetensors", "autobitlinear", "float32", 1e-4),
        ("safetensors", "autobitlinear", "bfloat16", 1e-3),
        ("safetensors", "bitlinear", "float32", 1e-4),
        ("safetensors", "bitlinear", "bfloat16", 1e-3),
    ],
)
def test_transformers_computes_the_trained_function(
    tmp_path: Path, fields: dict[str, int | str | bool], format: str, linear_class: str, dtype: str, bound: float
) -> None:
    if "attention_bias" in fields and (format, linear_class) == ("safetensors", "autobitlinear"):
        pytest.skip("transformers scales the biases of this class; the export is refused")
    write_master(tmp_path / "master", SHAPE | fields)
    export(tmp_path / "master", tmp_path / "out", format=format, linear_class=linear_class, dtype=dtype)
    (tmp_path / "text").write_text(TEXT)
    sample = take_sample(open_source(tmp_path / "master"), tmp_path / "text")
    logits = transformers_logits(tmp_path / "out", sample.ids)
    if "tie_word_embeddings" in fields:
        bound *= 10  # `random_model` makes the head three times as large as the embedding, and KL grows by the square
    assert agreement(sample, logits).kl < bound
    assert agreement(sample, sample.logits.roll(1, dims=-1)).kl > 20 * bound  # what another function would give


@pytest.mark.runtime
def test_greedy_text_is_ours(trained: Trained, tmp_path: Path) -> None:
    export(trained.folder, tmp_path / "packed", dtype="float32")  # in bfloat16 ties fall as the processor rounds
    ours, tokenizer = load_for_inference(trained.folder), Tokenizer.from_folder(trained.folder)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
        same = 0
        for text in trained.texts:
            ids = tokenizer.begun(tokenizer.encode(text[:7]))
            options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            expected = list(generate(ours, ids, (), max_new_tokens=64))
            assert len(set(expected)) > 8  # no token over and over
            same += theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() == expected
    assert same >= 8


@pytest.mark.runtime
def test_the_report_of_a_trained_model(trained: Trained, tmp_path: Path) -> None:
    export(trained.folder, tmp_path / "packed")
    (tmp_path / "text").write_text(trained.texts[0])
    (report,) = compare(trained.folder, tmp_path / "packed", tmp_path / "text")
    assert report.agreement is not None
    assert report.agreement.kl < 1e-3
    assert report.agreement.top1 > 0.99
    assert report.agreement.perplexity_ratio == pytest.approx(1, abs=0.01)
    assert report.lines()[0].text.startswith("transformers: KL ")
    assert report.agrees, report


@pytest.mark.runtime
def test_shards_load(trained: Trained, tmp_path: Path) -> None:
    export(trained.folder, tmp_path / "whole")
    export(trained.folder, tmp_path / "shards", max_shard_bytes=500_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids = list(range(20))
    assert torch.equal(transformers_logits(tmp_path / "whole", ids), transformers_logits(tmp_path / "shards", ids))


def test_the_tokenizer_and_the_stop_ids_travel_along(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf")
    for source in ("master", "model.gguf"):
        export(tmp_path / source, tmp_path / f"from {source}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"from {source}")
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / f"from {source}")
        assert tokenizer.decode(tokenizer("small things").input_ids, skip_special_tokens=True) == "small things"
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == f"{BOS}hi<|eot_id|>"
        )
        assert generation.bos_token_id == tokenizer.bos_token_id
        assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]


@pytest.mark.runtime
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_folder_that_transformers_saved_comes_back(tmp_path: Path, dtype: str, shard: str) -> None:
    """Its packed weights of class bitlinear, whole or in shards, in any dtype, with the codes that went in."""
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "packed", linear_class="bitlinear", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    assert (len([*(tmp_path / "saved").glob("*.safetensors")]) > 1) == (shard == "50KB")
    source, saved = open_source(tmp_path / "packed"), open_source(tmp_path / "saved")
    for name in source.ternary_names:
        expected, found = source.weights.ternary(name), saved.weights.ternary(name)
        assert torch.equal(found.codes, expected.codes)
        assert found.scale.item() == pytest.approx(expected.scale.item(), rel=2**-8)
    result = export(tmp_path / "saved", tmp_path / "m.gguf", format="gguf")
    assert result.verification is not None
    assert result.verification.differ == 0
    assert saved.trained_tokenizer.encode(TEXT) == source.trained_tokenizer.encode(TEXT)
    again = export(tmp_path / "saved", tmp_path / "again")
    assert again.verification is not None
    assert again.verification.differ == 0
