"""What all tests share: no network, nothing written to the home folder, fixed seeds, cheap tests first.

Python's sockets reach loopback only (`--allow-hosts` in pyproject.toml); the variables below say the same to the
libraries, and to the programs that tests start.
"""

import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bitnet_train  # noqa: F401  (before torch)

# isort: split
import hypothesis
import numpy as np
import pytest
import torch

_HOME = tempfile.TemporaryDirectory(prefix="bitnet-train-tests-")
os.environ |= {  # set before a test imports datasets, transformers or wandb, which read them once
    "HF_HOME": _HOME.name,
    "XDG_CACHE_HOME": _HOME.name,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    # Without a GPU, Triton's programs run in its interpreter. It is asked for before anything imports Triton.
    **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
}

TESTS = Path(__file__).parent
ORDER = {"unit": 0, "contract": 1, "parity": 2, "parallel": 3, "integration": 4}  # folders, from seconds to minutes

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER[item.path.relative_to(TESTS).parts[0]])
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":  # runs on a GPU where there is one
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _root_logger_kept() -> Iterator[None]:
    """A command configures logging for its own process; in a test its handlers would outlive the captured streams."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
