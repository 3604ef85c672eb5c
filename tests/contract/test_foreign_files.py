"""Whatever a file of others holds, a command ends as it should: with exit code 0 or 2, soon, and in little memory.

FUZZ_EXAMPLES=2000 tries so many changes of each group, other ones every time.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitnet_train.export import export
from bitnet_train.formats.json_file import read_json
from bitnet_train.formats.safetensors_file import LazyTensors, write_weights
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.pretrained import load_for_training
from bitnet_train.training.checkpoint import save
from tests.folders import write_master
from tests.fuzzed import SECONDS, Explorer, Group
from tests.support import ROOT, chat_rows, text_rows, write_jsonl

EXPORTS = (
    ("tools/export.py", "SRC", "out", "--format", "safetensors"),
    ("tools/export.py", "SRC", "out.gguf", "--format", "gguf"),
)
RUNS = (
    ("tools/generate.py", "SRC", "--prompt", "small", "--chat", "--max-new-tokens", "2"),
    ("tools/evaluate.py", "SRC", "--data", "chat.jsonl"),
)
TRAIN = (
    *("bitnet_train", "+recipe=sft", "init_from=model", "data.train=chat.jsonl", "data.val=null"),
    *("data.cache_dir=cache", "run_dir=trained", "trainer=cpu", "max_steps=1", "data.sequence_length=64"),
    *("global_batch_size=2", "micro_batch_size=2"),
)
FOLDER = (
    *("model/config.json", "model/config.json", "model/model.safetensors.index.json", "model/tokenizer.json"),
    *("model/tokenizer_config.json", "model/special_tokens_map.json", "model/generation_config.json"),
    *("model/README.md", "model/chat_template.jinja"),
)
RUN = ("run/metrics.jsonl", "run/status.json", "run/.hydra/config.yaml", "run/checkpoints/step-000007/manifest.json")
ROWS = ("chat.jsonl", "text.jsonl", "tasks.jsonl", "prompts.jsonl")


def of(source: str, *commands: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(source if word == "SRC" else word for word in command) for command in commands)


GROUPS = {  # changes that are tried, files, commands
    "a model folder": (30, Group(FOLDER, of("model", *EXPORTS, *RUNS))),
    "a GGUF file": (50, Group(("m.gguf",), of("m.gguf", *EXPORTS, *RUNS))),
    "a run": (
        10,
        Group(RUN, of("run", *EXPORTS, ("tools/report.py", "SRC")) + of("run/checkpoints/step-000007", EXPORTS[0])),
    ),
    "rows": (
        20,
        Group(
            ROWS,
            (
                (
                    "tools/evaluate.py",
                    "model",
                    "--data",
                    "chat=chat.jsonl",
                    "text=text.jsonl",
                    "--tasks",
                    "tasks.jsonl",
                ),
                ("tools/generate.py", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "1"),
            ),
        ),
    ),
    "the start of a run": (6, Group((*FOLDER, "chat.jsonl"), (TRAIN,))),
    "a recipe": (8, Group(("own/recipe/mine.yaml",), ((*TRAIN[:1], "--config-dir=own", "+recipe=mine", *TRAIN[2:]),))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file, as it should be."""
    folder = tmp_path_factory.mktemp("foreign")
    model = folder / "model"
    write_master(model)
    export(model, folder / "m.gguf", format="gguf")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write_weights(model, [LazyTensors.of(name, tensor) for name, tensor in tensors.items()], 400_000)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text(config["chat_template"])
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|end_of_text|>"}}))
    (model / "generation_config.json").write_text('{"bos_token_id": 290, "eos_token_id": [291, 292], "top_k": 5}')
    (model / "README.md").write_text("---\nlicense: mit\ntags: [bitnet]\n---\n# A model\n")
    write_jsonl(folder / "chat.jsonl", chat_rows(3))
    write_jsonl(folder / "text.jsonl", text_rows(3))
    write_jsonl(folder / "tasks.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0}])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "a"}])
    (folder / "own" / "recipe").mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "sft.yaml", folder / "own" / "recipe" / "mine.yaml")
    _write_run(folder / "run", model)
    return folder


def _write_run(run: Path, model: Path) -> None:
    shutil.copytree(model, run / "model")
    config = BitNetConfig.from_json(read_json(model / "config.json")).to_json()
    state = {"model": load_for_training(model).state_dict(), "identity": {"model": json.dumps(config)}}
    save(run / "checkpoints", 7, state, keep_last=1)
    events = [{"step": n, "tokens": 8 * n, "train/loss": 5.0 / n, "health/layers.0/zero": 0.3} for n in (1, 2)]
    write_jsonl(run / "metrics.jsonl", events)
    (run / "status.json").write_text('{"state": "done", "pid": 1, "step": 7}')
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text("recipe_name: sft\nseed: 0\ndata:\n  train: rows.jsonl\n")


@pytest.mark.parametrize("name", GROUPS)
def test_a_command_ends_with_0_or_2(folder: Path, tmp_path: Path, name: str) -> None:
    examples, group = GROUPS[name]
    examples = int(os.environ.get("FUZZ_EXAMPLES", examples))
    log = tmp_path / "log"
    process = Explorer(group, folder, examples, log)
    process.join(examples * SECONDS)
    process.kill()
    said = log.read_text(errors="replace")
    assert process.exitcode == 0, said.rpartition("# failed")[2] if "# failed" in said else said[-3000:]
