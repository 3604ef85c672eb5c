"""The LightningModule by itself."""

from dataclasses import replace

import torch

from bitnet_train.model.bitlinear import BitLinear, set_strength
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.execution import Execution
from bitnet_train.optim import AdamW
from bitnet_train.schedule import Constant
from bitnet_train.stages.pretrain import Pretrain
from bitnet_train.training.module import TrainingModule
from tests.support import TINY, tiny_tokenizer

CONFIG = replace(TINY, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)


def training_module(model: BitNetForCausalLM) -> TrainingModule:
    schedule = Constant(peak_lr=1e-3, warmup_steps=1, peak_weight_decay=0.0)
    optimizer = AdamW(grad_clip=1.0, betas=(0.9, 0.95), eps=1e-8)
    return TrainingModule(model, Pretrain(), optimizer, schedule, tiny_tokenizer(), 10, 1, 0)


def test_what_is_validated_is_what_would_be_exported() -> None:
    model = BitNetForCausalLM(CONFIG)
    set_strength(model, 0.25)  # in the middle of a quantisation warm-up
    training_module(model).on_validation_start()
    strengths = [module.strength for module in model.modules() if isinstance(module, BitLinear)]
    assert strengths == [1.0] * 7


def test_an_update_drops_the_codes_that_micro_batches_share() -> None:
    """AdamW's fused update leaves no trace in the weight's version: the module's own hook drops the codes."""
    model, ids = BitNetForCausalLM(CONFIG), torch.arange(20)[None]
    module = training_module(model)
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
