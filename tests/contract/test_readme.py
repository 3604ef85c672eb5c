"""The commands of the README and of docs/: those that are cheap are run, with a tiny model; all others are checked."""

import shutil
from pathlib import Path

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import SpecialIds, save_pretrained
from tests.commands import Command, check, commands, run
from tests.support import ROOT, environment, text_rows, tiny_tokenizer, write_jsonl

TOUR = ROOT / "docs/tour.md"  # its commands need what it adds: test_tour.py
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page != TOUR)]
RUN = [page for page in PAGES if "<!-- run:" in page.read_text(encoding="utf-8")]
MODEL = BitNetConfig(
    vocab_size=384,
    hidden_size=512,  # ik_llama.cpp makes IQ2_BN of rows of 512 and longer
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the quickstart leaves it, with a tiny model in the place of each of its three."""
    folder = tmp_path_factory.mktemp("readme")
    runs = folder / "runs/quickstart"
    torch.manual_seed(0)
    tokenizer, model = tiny_tokenizer(), BitNetForCausalLM(MODEL)
    special = SpecialIds(tokenizer.bos_token_id, tokenizer.stop_token_ids, tokenizer.pad_token_id)
    save_pretrained(runs / "pretrain/model", model, special, tokenizer.save)
    for stage in ("sft", "dpo"):
        shutil.copytree(runs / "pretrain", runs / stage)
    (runs / "data/pretrain").mkdir(parents=True)
    for name in ("english", "docstrings", "code", "heldout"):
        write_jsonl(runs / f"data/pretrain/{name}.jsonl", text_rows(40))
    tokenizer.save(runs / "data/tokenizer")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_could_be_typed(page: Path) -> None:
    for command in commands(page):
        if command.extra is None:
            check(command.words)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_cheap_commands_run(page: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # of the ranks that a command starts
        monkeypatch.setenv(name, environment()[name])
    folder = shutil.copytree(quickstart, tmp_path / "work")
    for command in commands(page):
        if command.extra is not None:
            run(command, folder)


@pytest.mark.parametrize("text", ["+recipe=nothing", "+recipe=sft data.trian=x", "+recipe=sft stage.reduction=most"])
def test_a_training_command_that_could_not_run_is_found(text: str) -> None:
    with pytest.raises(UserError):
        check(["python", "-m", "bitnet_train", *text.split()])


@pytest.mark.parametrize("text", ["python tools/export.py a b --formt", "pip install 'bitnet-train[no]'", "frob x"])
def test_another_command_that_could_not_run_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check(Command(text, None).words)
