"""ik_llama.cpp computes with an exported GGUF file what was trained, and tokenises as the trained tokenizer does.

Whole models are compared by KL, for rounding is chaotic. Measured over three seeds: 2e-4 nats for a tied and 3e-3 for
an untied head, I2_S (made IQ2_BN by the runtime) and floats alike; 3 for a wrong function, such as I2_S run as it is.
"""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_train.export import export
from tests.folders import write_master
from tests.runtimes import ik_llama, ik_llama_quantize

pytest.importorskip("ik_llama_cpp")
pytestmark = pytest.mark.runtime

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS = ["It's 12345 o'clock!", "def f(x):\n    return x  # é 你好 🙂\n\n", "  three   spaces\t\tand tabs\r\n"]


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """The mean over positions of KL(reference, other), in nats."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("type", "tied"), [("i2_s", True), ("f16", True), ("bf16", True), ("f32", True), ("i2_s", False), ("f32", False)]
)
def test_ik_llama_computes_the_trained_function(tmp_path: Path, type: str, tied: bool) -> None:
    model = write_master(tmp_path / "master", {**SHAPE, "tie_word_embeddings": tied})
    ids = torch.randint(0, 290, (48,))
    with torch.no_grad():
        trained = model(ids[None])[0]
    export(tmp_path / "master", tmp_path / "model.gguf", format="gguf", type=type)
    file = tmp_path / "model.gguf"
    if type == "i2_s":
        file = tmp_path / "iq2_bn.gguf"
        ik_llama_quantize(tmp_path / "model.gguf", file, "IQ2_BN")
    answer = ik_llama(file, ids.tolist(), TEXTS)
    assert mean_kl(trained, answer.logits) < 0.01
    tokenizer = Tokenizer.from_file(str(tmp_path / "master" / "tokenizer.json"))
    assert answer.ids == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
