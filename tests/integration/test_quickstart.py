"""`make quickstart` with a few steps per stage: every part of the way, and what other programs make of its result."""

import json
from pathlib import Path

import pytest
import torch

from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.export import export
from bitnet_train.export.runtimes import compare
from bitnet_train.generate import complete
from bitnet_train.model.pretrained import load_for_inference
from tests import forked
from tests.support import ROOT, python


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the quickstart was run, on a tenth of its data; it starts from a link to the tools."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "tools").symlink_to(ROOT / "tools")
    result = forked.python("tools/prepare_quickstart.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    for name, rows in {"sft/train": 100, "sft/heldout": 12, "dpo/train": 48, "dpo/heldout": 12}.items():
        file = folder / f"runs/quickstart/data/{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    result = python("tools/quickstart.py", "max_steps=4", cwd=folder, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder


def test_it_ends_with_figures_verified_exports_and_three_samples(quickstart: Path) -> None:
    output = (quickstart / "output.txt").read_text()
    assert output.count("verified: 14 matrices") == 2
    assert "not verified" not in output
    for stage in ("pretrain", "sft", "dpo"):
        assert (quickstart / f"runs/quickstart/{stage}/model/model.safetensors").is_file()
    assert sum(line.startswith(("What does", "Explain", "My linter")) for line in output.splitlines()) == 3


def test_run_again_it_trains_nothing(quickstart: Path) -> None:
    result = forked.python("tools/quickstart.py", "max_steps=4", cwd=quickstart)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "+recipe=" not in result.stdout
    assert result.stdout.count("verified: 14 matrices") == 2


@pytest.mark.runtime
def test_transformers_loses_nothing_chats_and_generates(quickstart: Path) -> None:
    transformers = pytest.importorskip("transformers")
    packed, heldout = quickstart / "runs/quickstart/packed", quickstart / "runs/quickstart/data/pretrain/heldout.jsonl"
    text = quickstart / "some.jsonl"
    text.write_text("".join(heldout.open().readlines()[:4]))
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed)
    total, count = 0.0, 0
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for line in text.open():
            ids = torch.tensor([[*tokenizer(json.loads(line)["text"]).input_ids[:500], tokenizer.eos_token_id]])
            assert ids[0, 0] == tokenizer.bos_token_id
            assert ids[0, 1] != tokenizer.bos_token_id
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("User: Hello<|eot_id|>Assistant: ")
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    short = quickstart / "short.jsonl"
    rows = [json.loads(line)["text"] for line in text.open()]
    ours = Tokenizer.from_folder(packed)
    short.write_text("".join(json.dumps({"text": ours.decode(ours.encode(row)[:499])}) + "\n" for row in rows))
    nll = evaluate(load_for_inference(packed), ours, str(short), sequence_length=512)["nll"]
    assert nll == pytest.approx(total / count, abs=0.01)


@pytest.mark.runtime
def test_answers_in_transformers_are_ours(quickstart: Path) -> None:
    """By the snippet of docs/deploying.md, from a packed folder in float32: the prompt decides, and the tokenizer."""
    transformers = pytest.importorskip("transformers")
    trained, packed = quickstart / "runs/quickstart/sft/model", quickstart / "packed32"
    export(trained, packed, dtype="float32")
    ours, tokenizer = load_for_inference(trained), Tokenizer.from_folder(trained)
    theirs = transformers.AutoTokenizer.from_pretrained(packed)
    lines = (quickstart / "runs/quickstart/data/sft/heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines[:12]]
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype="auto").eval()
        for question in questions:
            prompt = theirs.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            found = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            text = theirs.decode(found, skip_special_tokens=True)
            assert text == complete(ours, tokenizer, question, chat=True, max_new_tokens=12)
    assert len(questions) == 12


@pytest.mark.runtime
def test_the_runtimes_agree_with_what_was_trained(quickstart: Path) -> None:
    pytest.importorskip("ik_llama_cpp")
    folder = quickstart / "runs/quickstart"
    (quickstart / "heldout.txt").write_text(
        json.loads((folder / "data/pretrain/heldout.jsonl").open().readline())["text"]
    )
    for written in ("model.gguf", "packed"):
        (report,) = compare(folder / "dpo", folder / written, quickstart / "heldout.txt")
        assert report.agreement is not None, report
        assert report.agreement.kl < 5e-3
        assert report.tokenizer is not None
        assert report.tokenizer.prompts is not None
        assert report.agrees, report
        assert report.agreement.perplexity_ratio == pytest.approx(1, abs=0.01)
