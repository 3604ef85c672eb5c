"""The model card: what the model is, how it runs, how it was made."""

import json
from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.formats.gguf_file import GGUFFile
from tests.folders import write_master

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
    with pytest.raises(UserError, match=r"README\.md: must be YAML"):
        export(master, tmp_path / "packed")
