"""What every contestant of a stage is given: files in a folder, and the numbers of its training."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

MODEL = "model"  # the first weights: an HF folder of masters with the tokenizer
ROWS = "rows.safetensors"  # pre-training: input_ids and labels of all steps, int64 (steps * batch, seq)
HELD_OUT = "heldout.safetensors"  # input_ids and labels, int64 (rows, seq); of pairs also reference_logps
_TASK = "task.json"


@dataclass(frozen=True)
class Task:
    """The training of one stage, the same for all.

    Attributes:
        stage: pretrain, sft or dpo.
        folder: where `MODEL`, `ROWS` and `HELD_OUT` lie.
        caches: the folder of everybody's caches.
        train: the file of conversations or pairs.
        steps: updates of a run.
        batch: rows of an update; pairs in dpo.
        padded_batch: conversations that have as many tokens as `batch` packed rows.
        sequence_length: positions per row.
        lr: learning rate of every update.
        eval_every: updates between two looks at the held-out rows.
    """

    stage: str
    folder: Path
    caches: Path
    train: str
    steps: int
    batch: int
    padded_batch: int
    sequence_length: int
    lr: float
    eval_every: int

    def save(self) -> None:
        """Writes the numbers into the folder."""
        (self.folder / _TASK).write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """What `save` wrote."""
        values = json.loads((folder / _TASK).read_text())
        return cls(**{**values, "folder": folder, "caches": Path(values["caches"])})
