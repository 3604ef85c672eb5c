"""transformers computes with an exported folder what was trained.

Whole models are compared by KL: rounding is chaotic, a difference in the last place grows into another int8 code.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet_train.export import export
from tests.folders import write_master

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers loads no quantised model without it

SHAPE = {"hidden_size": 256, "intermediate_size": 512}


def logits(folder: Path, ids: Tensor) -> Tensor:
    """The logits of transformers for a folder, in the folder's dtype; compiled helpers run as they are written."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        output: Tensor = model(ids).logits
    return output


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """The mean over positions of KL(reference, other), in nats."""
    log_p, log_q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("format", "dtype", "bound"),
    [("master", "float32", 1e-4), ("safetensors", "float32", 1e-4), ("safetensors", "bfloat16", 1e-3)],
)
def test_transformers_computes_the_trained_function(tmp_path: Path, format: str, dtype: str, bound: float) -> None:
    model = write_master(tmp_path / "master", SHAPE)
    ids = torch.randint(0, 290, (2, 32))
    with torch.no_grad():
        trained = model(ids)
    export(tmp_path / "master", tmp_path / "out", format=format, dtype=dtype)
    found = logits(tmp_path / "out", ids)
    assert found.dtype == getattr(torch, dtype)
    assert mean_kl(trained, found) < bound
    assert mean_kl(trained, trained.roll(1, dims=-1)) > 20 * bound  # what another function would give


def test_the_tokenizer_and_the_stop_ids_travel_along(tmp_path: Path) -> None:
    write_master(tmp_path / "master")
    export(tmp_path / "master", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("small things").input_ids) == "small things"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|eot_id|>"
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
