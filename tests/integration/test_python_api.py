"""The LightningModule and the LightningDataModule in a program of one's own, without the command line."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from bitnet_train.data.module import DataModule, TextData
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.optim import AdamW
from bitnet_train.schedule import Cosine
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training.module import TrainingModule
from tests.support import TINY, text_rows, tiny_tokenizer, write_jsonl


def test_a_lightning_trainer_of_ones_own_trains(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "text.jsonl", text_rows(60))
    tokenizer = tiny_tokenizer()
    rows = TextData(train=str(corpus), val=str(corpus), sequence_length=64, cache_dir=str(tmp_path / "cache"))
    data = DataModule(rows, tokenizer, seed=0, global_batch_size=4, micro_batch_size=2)
    optimizer = AdamW(betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0)
    schedule = Cosine(peak_lr=3e-3, end_lr=3e-4, warmup_steps=2, peak_weight_decay=0.1)
    model = BitNetForCausalLM(TINY)
    module = TrainingModule(model, Pretrain(), optimizer, schedule, tokenizer, steps=12, log_every=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=module.steps,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    assert (module.step, trainer.global_step, trainer.accumulate_grad_batches) == (12, 12, 2)
    assert module.latest["train/loss"] < 5.0
