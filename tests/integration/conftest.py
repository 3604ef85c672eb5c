"""What tests of several runtimes share: the shape that all of them run, and one model that has learnt something."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.folders import write_trained

SHAPE: dict[str, int | str | bool] = {
    "hidden_size": 512,  # ik_llama.cpp makes IQ2_BN of rows of 512 and longer
    "intermediate_size": 1536,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class Trained(NamedTuple):
    """A folder of masters, and the texts that they know by heart."""

    folder: Path
    texts: list[str]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained") / "master"
    torch.manual_seed(0)
    return Trained(folder, write_trained(folder, SHAPE | {"num_hidden_layers": 1}))
