"""What a user would pick instead: `python tools/peers/others.py NAME FOLDER TASK STEPS`.

Every contestant has float32 masters, bf16 autocast, the same AdamW with the same constant rate, the same clipping and
no checkpointing of activations (TRL's default turns it on, which would save memory and cost time).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peers.clock import BETA, Clock
from peers.task import MODEL, ROWS, Task

_BETAS = (0.9, 0.95)


def load(task: Task, quantize: bool = True) -> Any:
    """transformers' decoder with the first weights; without `quantize` its linear layers are plain ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(task.folder / MODEL)
    if not quantize:
        del config.quantization_config
    model: nn.Module = AutoModelForCausalLM.from_pretrained(task.folder / MODEL, config=config, dtype=torch.float32)
    return model.train().to("cuda" if torch.cuda.is_available() else "cpu")


def auto_bit_linear(task: Task) -> Any:
    """quantization_config online: AutoBitLinear, as the master folder says."""
    return load(task)


def torchao(task: Task) -> Any:
    """torchao's prototype of BitNet training in place of the linear layers."""
    from torchao import quantize_
    from torchao.prototype.quantized_training import bitnet_training

    model = load(task, quantize=False)
    quantize_(model.model.layers, bitnet_training())
    return model


def onebitllms(task: Task) -> Any:
    """onebitllms' Triton kernels in place of the linear layers."""
    from onebitllms import replace_linear_with_bitnet_linear

    model = load(task, quantize=False)
    model.model.layers = replace_linear_with_bitnet_linear(model.model.layers)
    return model


def batches(task: Task, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels `(rows, seq)` of every step: the rows that bitnet_train trains on, in its order."""
    rows = load_file(task.folder / ROWS)
    steps = (rows[name].split(task.batch) for name in ("input_ids", "labels"))
    for ids, labels in islice(zip(*steps, strict=True), task.steps):
        yield ids.to(device), labels.to(device)


def plain_loop(build: Callable[[Task], Any], task: Task, clock: Clock) -> None:
    """Pre-training as a page of torch."""
    model = build(task)
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, betas=_BETAS, weight_decay=0.0, fused=True)
    for ids, labels in batches(task, device):
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.count(int((labels != -100).sum()))
        clock.step_ended(model)


def trainer_options(task: Task, folder: Path, batch: int) -> dict[str, Any]:
    """What SFTConfig and DPOConfig are both given."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "max_length": task.sequence_length,
        "max_steps": task.steps,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": _BETAS[0],
        "adam_beta2": _BETAS[1],
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def rows_and_tokenizer(task: Task, columns: list[str]) -> tuple[Any, Any]:
    """The training file as a data set, and the tokenizer."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.folder / MODEL)
    rows = load_dataset("json", data_files=task.train, split="train").select_columns(columns)
    return rows, tokenizer


def count_tokens(model: nn.Module, clock: Clock) -> None:
    """Counts in every forward pass of training; padding-free rows say by their positions where a document begins."""

    def look(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            clock.count(int(mask.sum()) - len(mask))
        else:
            assert positions is not None
            clock.count(int((positions != 0).sum()))

    model.register_forward_pre_hook(look, with_kwargs=True)


def train(trainer: Any, clock: Clock) -> None:
    """Runs TRL's trainer with the clock as a callback."""
    from transformers import TrainerCallback

    class ReadClock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended(trainer.model)

    trainer.add_callback(ReadClock())
    count_tokens(trainer.model, clock)
    trainer.train()


def sft(packing: bool, task: Task, clock: Clock) -> None:
    """TRL's SFTTrainer: loss on the answers, rows packed ("bfd", by position ids) or a conversation each, padded."""
    from trl import SFTConfig, SFTTrainer

    rows, tokenizer = rows_and_tokenizer(task, ["messages"])
    options = trainer_options(task, clock.folder, task.batch if packing else task.padded_batch)
    config = SFTConfig(**options, packing=packing, assistant_only_loss=True)
    train(SFTTrainer(model=load(task), args=config, train_dataset=rows, processing_class=tokenizer), clock)


def dpo(precompute: bool, task: Task, clock: Clock) -> None:
    """TRL's DPOTrainer, the reference beside the policy (its default) or computed before."""
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = rows_and_tokenizer(task, ["prompt", "chosen", "rejected"])
    options = trainer_options(task, clock.folder, task.batch)
    config = DPOConfig(**options, beta=BETA, precompute_ref_log_probs=precompute)
    train(DPOTrainer(model=load(task), args=config, train_dataset=rows, processing_class=tokenizer), clock)


CONTESTANTS: dict[str, Callable[[Task, Clock], None]] = {
    "transformers": partial(plain_loop, auto_bit_linear),
    "torchao": partial(plain_loop, torchao),
    "onebitllms": partial(plain_loop, onebitllms),
    "trl, packed": partial(sft, True),
    "trl, padded": partial(sft, False),
    "trl": partial(dpo, False),
    "trl, precomputed": partial(dpo, True),
}


def main() -> None:
    """Trains and leaves the result in FOLDER."""
    name, folder, task_folder, steps = sys.argv[1:]
    task = replace(Task.load(Path(task_folder)), steps=int(steps))
    clock = Clock(folder, task_folder, task.eval_every)
    CONTESTANTS[name](task, clock)
    clock.finish()


if __name__ == "__main__":
    main()
