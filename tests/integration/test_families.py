"""Runs with tokenizers of other families: what a run logs, writes, exports and says is of one tokenizer."""

import json
import math
from pathlib import Path

import pytest
import torch

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.export import export
from bitnet_train.export.tokenization import check_folder
from bitnet_train.generate import complete
from bitnet_train.model.pretrained import load_for_inference
from tests.families import TEXTS, write_family
from tests.runs import train
from tests.support import DENSE, chat_rows, write_jsonl

transformers = pytest.importorskip("transformers")

SMALL = [
    *("trainer=cpu", "global_batch_size=4", "micro_batch_size=4", "max_steps=2", "log_every=1", "val_every=2"),
    *("schedule.warmup_steps=1", "data.cache_dir=cache", "data.sequence_length=64"),
]
PRETRAIN = [
    *("+recipe=quickstart-pretrain", "model=tiny", "model.vocab_size=512", "model.hidden_size=128"),
    *("model.intermediate_size=256", "model.max_position_embeddings=64", "data.train=text.jsonl"),
    *("data.val=heldout.jsonl", "data.tokenizer=tokenizer", "trainer.precision=32-true"),
]


@pytest.mark.parametrize("family", ["llama-2", "mistral", "gemma", "qwen2", "unigram"])
def test_bits_per_byte_of_a_run_are_those_of_evaluate(tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "tokenizer", family)
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    heldout = [{"text": text} for text in (TEXTS[0], "a brown fox. yes", "question and answer", TEXTS[1])]
    write_jsonl(tmp_path / "heldout.jsonl", heldout)
    result = train(*PRETRAIN, *SMALL, "run_dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()][-1]
    model, tokenizer = load_for_inference(tmp_path / "run/model"), Tokenizer.from_folder(tmp_path / "run/model")
    measured = evaluate(model, tokenizer, str(tmp_path / "heldout.jsonl"), sequence_length=64)
    assert measured["nll"] == pytest.approx(logged["val/loss"], rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(logged["val/bits_per_byte"], rel=1e-4)
    texts = sum(len(str(row["text"]).encode()) for row in heldout)
    if tokenizer.bos_token_id is not None:
        assert measured["bytes"] == texts
    else:  # the first token of a document is predicted from nothing, and counts for nothing
        firsts = sum(tokenizer.first_byte_lengths[tokenizer.encode(str(row["text"]))[0]] for row in heldout)
        assert measured["bytes"] == texts - firsts


@pytest.mark.runtime
def test_a_qwen2_is_fine_tuned_deployed_and_asked(tmp_path: Path) -> None:
    """No BOS anywhere; ChatML's end of a turn stops; biases of q, k and v."""
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(16))
    config = transformers.Qwen2Config(**DENSE, vocab_size=512, bos_token_id=None, eos_token_id=322)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    write_family(tmp_path / "qwen2", "qwen2")
    command = ["+recipe=quickstart-sft", "init_from=qwen2", "data.train=chat.jsonl", "data.val=chat.jsonl"]
    result = train(*command, *SMALL, "data.sequence_length=200", "run_dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "run/model/config.json").read_text())
    generation = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (None, 322)
    assert generation == {"eos_token_id": [322], "pad_token_id": 320}
    export(tmp_path / "run", tmp_path / "packed", linear_class="bitlinear", dtype="float32")
    tokenizer = Tokenizer.from_folder(tmp_path / "run/model")
    found = check_folder(tokenizer, tmp_path / "packed")
    assert found.agrees, found
    assert found.prompts is not None
    assert (found.prompts.compared, found.texts.compared) == (36, 200)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
        assert model.config.bos_token_id is None
        prompt = theirs.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    ours = complete(load_for_inference(tmp_path / "run/model"), tokenizer, "Hi", chat=True, max_new_tokens=8)
    assert ours == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["qwen2", "llama-2"])
def test_bits_per_byte_of_answers_are_those_of_evaluate(tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "tokenizer", family)
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(8))
    command = [*PRETRAIN, *SMALL, "data=chat", "stage=sft", "data.train=chat.jsonl", "data.val=chat.jsonl"]
    sizes = ["data.sequence_length=400", "model.max_position_embeddings=400"]
    result = train(*command, *sizes, "run_dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()][-1]
    model, tokenizer = load_for_inference(tmp_path / "run/model"), Tokenizer.from_folder(tmp_path / "run/model")
    measured = evaluate(model, tokenizer, str(tmp_path / "chat.jsonl"))
    assert measured["bits_per_byte"] == pytest.approx(logged["val/bits_per_byte"], rel=1e-4)
    assert math.exp(measured["nll"]) == pytest.approx(measured["perplexity"])
