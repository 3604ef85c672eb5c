"""The LightningModule by itself."""

import torch

from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.execution import Execution
from bitnet_train.optim import AdamW
from bitnet_train.schedule import Constant
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training.module import TrainingModule
from tests.support import tiny_tokenizer

CONFIG = BitNetConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_an_update_drops_the_codes_that_micro_batches_share() -> None:
    """AdamW's fused update leaves no trace in the weight's version: the module's own hook drops the codes."""
    model, ids = BitNetForCausalLM(CONFIG), torch.arange(20)[None]
    schedule = Constant(peak_lr=1e-3, warmup_steps=1, peak_weight_decay=0.0)
    module = TrainingModule(
        model, Pretrain(), AdamW(grad_clip=1.0, betas=(0.9, 0.95), eps=1e-8), schedule, tiny_tokenizer(), 10, 1, 0
    )
    Execution().apply(model, micro_batches=2)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = model(ids)
    before.square().sum().backward()
    optimizer.step()
    after = model(ids)
    Execution().apply(model, micro_batches=1)
    assert torch.equal(after, model(ids))
    assert not torch.equal(after, before)
