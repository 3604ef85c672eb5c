"""What the model writes at every validation: greedy continuations of a few prompts."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning as L

from bitnet_train.generate import complete
from bitnet_train.training.loggers import append
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.sharding import is_sharded

log = logging.getLogger(__name__)


class Samples(L.Callback):
    """Appends {"step", "prompt", "text"} to samples.jsonl in the run directory, and prints it.

    Args:
        prompts: texts to continue, or users' messages where `chat` sends them through the template.
        chat: whether the prompts are messages.
        max_new_tokens: length of a sample.
    """

    def __init__(self, prompts: Sequence[str], chat: bool = False, max_new_tokens: int = 64) -> None:
        self.prompts, self.chat, self.max_new_tokens = list(prompts), chat, max_new_tokens

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first rank samples; sharded ranks all do. What the disk does not take is in the log."""
        assert isinstance(pl_module, TrainingModule)
        if not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        lines = [json.dumps(self._sample(pl_module, prompt), ensure_ascii=False) + "\n" for prompt in self.prompts]
        try:
            if trainer.is_global_zero:
                append(Path(trainer.default_root_dir) / "samples.jsonl", "".join(lines))
        except OSError as error:
            log.warning("samples.jsonl cannot be written (%s)", error.strerror)

    def _sample(self, module: TrainingModule, prompt: str) -> dict[str, str | int]:
        text = module.gathered(
            complete, module.model, module.tokenizer, prompt, self.chat, max_new_tokens=self.max_new_tokens
        )
        log.info("step %d  %s -> %s", module.step, prompt, text)
        return {"step": module.step, "prompt": prompt, "text": text}
