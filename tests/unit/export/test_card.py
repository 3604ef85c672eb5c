"""The model card: what the model is, how it runs, how it was made."""

import json
from pathlib import Path

import pytest
import yaml

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.formats.gguf_file import GGUFFile
from tests.folders import edit_config, write_master

CONFIG = """recipe_name: sft
init_from: runs/base
seed: 3
global_batch_size: 16
data:
  train: rows.jsonl
  sequence_length: 64
schedule:
  peak_lr: 0.001
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with its configuration and metrics."""
    run = tmp_path / "a run"
    write_master(run / "model")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text(CONFIG)
    events = [{"step": 1, "train/loss": 9.0}, {"step": 20, "tokens": 12345, "train/loss": 2.34567}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_a_card_tells_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "packed", licence="mit")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: mit\n---\n# a run\n" in card
    for row in (
        "| recipe | sft |",
        "| started from | runs/base |",
        "| training data | rows.jsonl |",
        "| peak learning rate | 0.001 |",
        "| step | 20 |",
        "| tokens | 12,345 |",
        "| train/loss | 2.346 |",
        "| parameters | 335,232, 294,912 of them ternary |",
        "| size | 0.2 MB |",
    ):
        assert row in card
    assert "validation data" not in card
    assert CONFIG.strip() in card


def test_a_card_names_no_folder_of_the_machine(run_dir: Path, tmp_path: Path) -> None:
    """Nor does any other file of an export, of a folder as others leave it."""
    private = tmp_path / "home" / "alice" / "client"
    private.mkdir(parents=True)
    (private / "rows.jsonl").touch()
    config = f"""init_from: {private}/base
run_dir: {run_dir}
data:
  train: [{private}/rows.jsonl, org/rows, client=home/alice/client/rows.jsonl]
  val: name={private}/rows.jsonl
  cache_dir: ~/.cache/rows
  tokenizer: file://{private}/tok
"""
    (run_dir / ".hydra" / "config.yaml").write_text(config)
    edit_config(run_dir / "model", _name_or_path=f"{private}/base")
    tokenizer_config = run_dir / "model" / "tokenizer_config.json"
    fields = {"name_or_path": f"{private}/base", "special_tokens_map_file": f"{private}/special_tokens_map.json"}
    tokenizer_config.write_text(json.dumps(json.loads(tokenizer_config.read_text()) | fields))
    (run_dir / "model" / "generation_config.json").write_text(
        json.dumps({"_from": f"{private}/base", "eos_token_id": 291})
    )
    (tmp_path / "source").mkdir()
    for file in (run_dir / "model").iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "source" / "README.md").write_text(
        f"# Mine\n\nTrained on `{private}/rows.jsonl`, see https://a.org/b/c."
    )
    exports = {
        "packed": {},
        "master": {"format": "master"},
        "m.gguf": {"format": "gguf", "name": str(private / "model")},
    }
    for source in (run_dir, tmp_path / "source"):
        for name, how in exports.items():
            result = export(source, tmp_path / "out" / source.name / name, **how)  # type: ignore[arg-type]
            texts = [result.card.encode(), *(file.read_bytes() for file in files_of(result.path))]
            for text in texts:
                for secret in (str(tmp_path), "alice", "client", "/tmp/"):
                    assert secret.encode() not in text.replace(b"client=", b""), (source.name, name, secret)
    card = (tmp_path / "out" / "a run" / "packed" / "README.md").read_text()
    assert "| started from | base |" in card
    assert "- rows.jsonl\n  - org/rows\n  - client=rows.jsonl\n  val: name=rows.jsonl\n" in card
    card = (tmp_path / "out" / "source" / "packed" / "README.md").read_text()
    assert card.endswith("Trained on `rows.jsonl`, see https://a.org/b/c.\n")


def files_of(path: Path) -> list[Path]:
    return [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]


def test_names_and_values_are_text_and_no_markup(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / ".hydra" / "config.yaml").write_text("recipe_name: 'a | b <script>'\nnote: |\n  ```\n  </details>\n")
    name = "x\n---\n# <script>alert(1)</script> [a](b) `c`"
    target = tmp_path / 'it\'s "a" name'
    card = export(run_dir, target, name=name).card
    heading = r"# x --- \# &lt;script>alert(1)&lt;/script> \[a\](b) \`c\`"
    assert f"\n---\n{heading}\n" in card
    assert r"| recipe | a \| b &lt;script> |" in card
    assert 'from_pretrained("it\'s \\"a\\" name")' in card
    assert "\n````yaml\nrecipe_name: " in card
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter.keys() == {"library_name", "pipeline_tag", "tags"}
    card = export(run_dir, tmp_path / "m'; rm -rf.gguf", format="gguf", name=name).card
    assert "-m 'm'\"'\"'; rm -rf.gguf' -p" in card
    exported = export(tmp_path / "m'; rm -rf.gguf", tmp_path / "back").card
    assert f"\n---\n{heading}\n" in exported


def test_without_a_run_the_card_of_the_source_follows(master: Path, tmp_path: Path) -> None:
    (master / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n\nMade by hand.\n")
    export(master, tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert card.endswith("## Card of the source\n\n# A model\n\nMade by hand.\n")


def test_the_licence_and_the_name_go_into_a_gguf_file(master: Path, tmp_path: Path) -> None:
    export(master, tmp_path / "a.gguf", format="gguf", licence="mit", name="Small")
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    assert metadata["general.license"] == "mit"
    assert metadata["general.name"] == "Small"
    export(tmp_path / "a.gguf", tmp_path / "packed")
    assert "license: mit\n---\n# Small\n" in (tmp_path / "packed" / "README.md").read_text()


def test_front_matter_that_is_no_yaml_is_refused(master: Path, tmp_path: Path) -> None:
    (master / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md: line 2: must be YAML"):
        export(master, tmp_path / "packed")
