"""A small model that has learnt something, as masters and packed, and questions about what it learnt."""

from pathlib import Path

import pytest
import torch

from bitnet_train.export import export
from tests.folders import write_trained

ANIMALS = ("cat", "dog", "fox", "owl", "hen", "ant", "bee", "cow", "pig", "rat")


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It knows texts such as "The cat number 11 sat on mat 121. " by heart, or nearly."""
    folder = tmp_path_factory.mktemp("evaluated") / "master"
    torch.manual_seed(0)
    write_trained(folder, {"max_position_embeddings": 128, "num_hidden_layers": 1}, steps=120)
    return folder


@pytest.fixture(scope="session")
def packed(master: Path) -> Path:
    export(master, master.with_name("packed"), format="safetensors")
    return master.with_name("packed")


@pytest.fixture(scope="session")
def choices() -> list[dict[str, object]]:
    """Ten rows; the right choice stands at every place, and a long one is likely by character and not as a whole."""
    rows: list[dict[str, object]] = []
    for n, animal in enumerate(ANIMALS, 11):
        texts = [str(n * n), f"{n * n + 7}. The {animal} number {n} sat on mat", str(n * n + 2 * n + 1)]
        place = n % 3
        texts.insert(place, texts.pop(0))
        rows.append({"context": f"The {animal} number {n} sat on mat", "choices": texts, "answer": place})
    return rows


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, object]]:
    """Ten rows; the answers end with a full stop."""
    return [
        {"prompt": f"The {animal} number {n} sat on mat", "answer": str(n * n), "stop": ["."]}
        for n, animal in enumerate(ANIMALS, 11)
    ]
