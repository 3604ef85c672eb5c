"""The task of a stage out of the quickstart's recipe: weights, rows and held-out rows in a folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from bitnet_train import config as configuration
from bitnet_train.data.batches import TokenBatch, TokenRow, collate
from bitnet_train.data.module import DataModule, Rows
from bitnet_train.data.packing import PackedRows, PairRows
from bitnet_train.data.store import ids_of, trained_of
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import SpecialIds, load_for_training, save_pretrained, source_folder
from inspect_batch import composed, data_of
from peers.clock import logps
from peers.task import HELD_OUT, MODEL, ROWS, Task

_HELD_OUT_ROWS = 24

# The recipes' schedules and the summed loss of SFT have no counterpart in TRL: a constant rate and the mean have.
_WORDS = {
    "pretrain": ("schedule=constant", "~schedule.second_lr"),
    "sft": ("schedule=constant", "~schedule.end_lr", "stage.reduction=mean"),
    "dpo": ("schedule=constant", "~schedule.end_lr"),
}
_RATES = {"pretrain": 4e-4, "sft": 5e-4, "dpo": 5e-5}


def words_of(stage: str, caches: Path, overrides: Sequence[str]) -> list[str]:
    """The words of bitnet_train's command, but for the number of steps."""
    trainer = "trainer=gpu" if torch.cuda.is_available() else "trainer=cpu"
    common = (
        trainer,
        "schedule.warmup_steps=0",
        f"schedule.peak_lr={_RATES[stage]}",
        f"data.cache_dir={caches / 'tokens'}",
    )
    return [f"+recipe=quickstart-{stage}", *_WORDS[stage], *common, *overrides]


def prepare(stage: str, folder: Path, caches: Path, steps: int, eval_every: int, overrides: Sequence[str]) -> Task:
    """Fills the folder and returns what is in it.

    Raises:
        UserError: the data or the weights that training starts from are not there, or an override is wrong.
    """
    config = composed([*words_of(stage, caches, overrides), f"max_steps={steps}"])
    data, tokenizer = data_of(config)
    data.steps = steps
    folder.mkdir(parents=True, exist_ok=True)
    _save_model(config, tokenizer, folder / MODEL)
    if stage == "pretrain":
        save_file(_fields(_all_steps(data)), folder / ROWS)
    save_file(_held_out(data.row_sets["val"], folder / MODEL, tokenizer), folder / HELD_OUT)
    batch = data.global_batch_size
    task = Task(
        stage=stage,
        folder=folder,
        caches=caches,
        train=str(config.data.train),
        steps=steps,
        batch=batch,
        padded_batch=_conversations(data.row_sets["train"], batch),
        sequence_length=data.config.sequence_length,
        lr=_RATES[stage],
        eval_every=eval_every,
    )
    task.save()
    return task


def _save_model(config: DictConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """The weights of init_from, or fresh ones."""
    if config.init_from is not None:
        shutil.copytree(source_folder(config.init_from, "init_from"), folder)
        return
    torch.manual_seed(0)
    model = BitNetForCausalLM(configuration.build(config.model, "model"))
    special = SpecialIds(tokenizer.bos_token_id, tokenizer.stop_token_ids, tokenizer.pad_token_id)
    save_pretrained(folder, model, special, tokenizer.save, "Fresh weights of a benchmark.\n")


def _all_steps(data: DataModule) -> TokenBatch:
    """The rows of all steps in the order of the run."""
    rows = data.row_sets["train"]
    numbers = [number for micro_batch in data.micro_batches(rank=0, ranks=1) for number in micro_batch]
    batch: TokenBatch = rows.collate([rows[number] for number in numbers])
    return batch


def _fields(batch: TokenBatch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "labels": batch.labels}


def _held_out(rows: Rows, model_folder: Path, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The first rows; conversations stand alone, and pairs carry what the first weights say about them."""
    if isinstance(rows, PairRows):
        pairs: TokenBatch = rows.collate([rows[n] for n in range(min(len(rows), _HELD_OUT_ROWS))]).tokens
        fields = _fields(pairs)
        reference = logps(load_for_training(model_folder), *fields.values())
        return {**fields, "reference_logps": reference.view(2, -1)}
    if isinstance(rows, PackedRows):
        items = range(min(len(rows.items), _HELD_OUT_ROWS))
        return _fields(collate([_alone(rows, item) for item in items], tokenizer.pad_token_id))
    batch: TokenBatch = rows.collate([rows[n] for n in range(min(len(rows), _HELD_OUT_ROWS))])
    return _fields(batch)


def _alone(rows: PackedRows, item: int) -> TokenRow:
    tokens = rows.items.sequence(item)
    return TokenRow(ids_of(tokens), trained_of(tokens).astype(np.int64), np.zeros(len(tokens), dtype=np.int64))


def _conversations(rows: Rows, batch: int) -> int:
    """How many conversations stand in `batch` packed rows on the average; `batch` where nothing is packed."""
    return round(len(rows.items) / len(rows) * batch) if isinstance(rows, PackedRows) else batch
