"""Inference runtimes to compare an export with: ik_llama.cpp, as the wheel ik-llama-cpp-python carries it.

Each call runs in a process of its own: what goes wrong in C ends that process, not the tests. Run as a program, this file
is that process: `runtimes.py MODEL.gguf OUT.npz` reads {"tokens": [...], "texts": [...]} from stdin.
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

_TIMEOUT = 120  # seconds


class Answer(NamedTuple):
    """Logits float32 `(tokens, vocab)` after each token, and the ids of each text, without BOS."""

    logits: np.ndarray
    ids: list[list[int]]


def ik_llama_quantize(source: Path, target: Path, type_name: str) -> None:
    """Runs the wheel's llama-quantize, `--allow-requantize`: ik_llama.cpp reads I2_S but computes with its own types."""
    package = _package()
    command = [package / "bin" / "llama-quantize", "--allow-requantize", source, target, type_name, "1"]
    _run([str(part) for part in command], "", {"LD_LIBRARY_PATH": str(package / "lib")})


def ik_llama(model: Path, tokens: Sequence[int], texts: Sequence[str] = ()) -> Answer:
    """Logits of one token sequence, and the runtime's tokenisation of texts."""
    out = model.with_suffix(".npz")
    request = json.dumps({"tokens": list(tokens), "texts": list(texts)})
    _run([sys.executable, __file__, str(model), str(out)], request, {})
    with np.load(out) as answer:
        return Answer(answer["logits"], [answer[f"ids{index}"].tolist() for index in range(len(texts))])


def _package() -> Path:
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _run(command: Sequence[str], stdin: str, environment: dict[str, str]) -> None:
    result = subprocess.run(
        command, input=stdin, env=os.environ | environment, capture_output=True, text=True, timeout=_TIMEOUT
    )
    assert result.returncode == 0, (
        f"{command[0]} ended with {result.returncode}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    )


def _answer(model_path: str, out: str) -> None:
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import IkContext, IkModel, make_batch

    request = json.load(sys.stdin)
    tokens = request["tokens"]
    model = IkModel(model_path)
    context = IkContext(model, n_ctx=256, n_threads=1, flash_attn=False)
    batch = make_batch(tokens)
    for index in range(len(tokens)):
        batch.logits[index] = 1
    assert context.decode(batch) == 0
    logits = [np.ctypeslib.as_array(context.get_logits(index), (model.n_vocab,)).copy() for index in range(len(tokens))]
    api.llama_batch_free(batch)
    ids = {f"ids{i}": np.array(model.tokenize(t, add_bos=False), np.int64) for i, t in enumerate(request["texts"])}
    np.savez(out, logits=np.stack(logits), **ids)


if __name__ == "__main__":
    _answer(sys.argv[1], sys.argv[2])
