"""Inference runtimes to compare an export with: ik_llama.cpp, as the wheel ik-llama-cpp-python carries it.

Each call runs in a process of its own: what goes wrong in C ends that process, not the tests. Run as a program, this
file is that process: `runtimes.py MODEL.gguf LOGITS.npy`, with {"tokens": [...], "texts": [...]} on stdin.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_TIMEOUT = 120  # seconds


class Answer(NamedTuple):
    """Logits float32 `(tokens, vocab)` after each token, and the ids of each text, without BOS."""

    logits: Tensor
    ids: list[list[int]]


def ik_llama_quantize(source: Path, target: Path, type_name: str) -> None:
    """Runs the wheel's llama-quantize: ik_llama.cpp reads I2_S, but computes with types of its own (IQ2_BN).

    Embedding and head stay F16, as bitnet.cpp has them; left alone, the program makes IQ4_NL and Q6_K of them.
    """
    package = _package()
    floats = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")
    command = [package / "bin" / "llama-quantize", "--allow-requantize", *floats, source, target, type_name, "1"]
    _run([str(part) for part in command], "", {"LD_LIBRARY_PATH": str(package / "lib")})


def ik_llama(model: Path, tokens: Sequence[int], texts: Sequence[str] = ()) -> Answer:
    """Logits of one token sequence, and the runtime's tokenisation of texts."""
    logits = model.with_suffix(".npy")
    request = json.dumps({"tokens": list(tokens), "texts": list(texts)})
    ids = _run([sys.executable, __file__, str(model), str(logits)], request, {})
    return Answer(torch.from_numpy(np.load(logits)), json.loads(ids))


def _package() -> Path:
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _run(command: Sequence[str], stdin: str, environment: dict[str, str]) -> str:
    result = subprocess.run(
        command, input=stdin, env=os.environ | environment, capture_output=True, text=True, timeout=_TIMEOUT
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, f"{command[0]} ended with {result.returncode}: {log[-2000:]}"
    return result.stdout


def _answer(model_path: str, logits_path: str) -> None:
    from ik_llama_cpp._internals import IkContext, IkModel, make_batch

    request = json.load(sys.stdin)
    count = len(request["tokens"])
    model = IkModel(model_path)
    context = IkContext(model, n_ctx=256, n_threads=1, flash_attn=False)
    batch = make_batch(request["tokens"])
    for index in range(count):
        batch.logits[index] = 1
    assert context.decode(batch) == 0
    logits = [np.ctypeslib.as_array(context.get_logits(index), (model.n_vocab,)).copy() for index in range(count)]
    np.save(logits_path, np.stack(logits))
    print(json.dumps([model.tokenize(text, add_bos=False) for text in request["texts"]]))


if __name__ == "__main__":
    _answer(sys.argv[1], sys.argv[2])
