"""ik_llama.cpp and llama.cpp, as the wheels ik-llama-cpp-python and llama-cpp-python carry them.

Each call runs in a process of its own: what goes wrong in C ends that process, not this one. Run as a program, this
file is that process: `llama_process.py PACKAGE MODEL.gguf LOGITS.npy`, with {"tokens": [...], "texts": [...], "stops":
[...]} on stdin.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IK_LLAMA, LLAMA = "ik_llama_cpp", "llama_cpp"  # the packages
_TIMEOUT = 600  # seconds


class RuntimeFailure(RuntimeError):
    """The process ended with an error; the message is the end of its output."""


class NotForThis(RuntimeFailure):
    """The runtime is not meant for a model of this shape: another program runs it."""


class Text(NamedTuple):
    """A text to tokenise.

    Attributes:
        special: whether the names of special tokens in it become their ids.
        add_bos: whether BOS is put in front, where the file says so.
    """

    text: str
    special: bool = False
    add_bos: bool = False


class Answer(NamedTuple):
    """Logits float32 `(tokens, vocab)` after each token, the ids of each text, and which of `stops` end a text."""

    logits: NDArray[np.float32]
    ids: list[list[int]]
    stops: list[int]


def installed(package: str) -> bool:
    """Whether a runtime's package can be imported."""
    return importlib.util.find_spec(package) is not None


def ik_llama_quantize(source: Path, target: Path, type_name: str = "IQ2_BN") -> None:
    """Runs the wheel's llama-quantize: ik_llama.cpp reads I2_S, but computes with types of its own (IQ2_BN).

    Embedding and head stay F16, as bitnet.cpp has them; left alone, the program makes IQ4_NL and Q6_K of them.
    """
    spec = importlib.util.find_spec(IK_LLAMA)
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    floats = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")
    command = [package / "bin" / "llama-quantize", "--allow-requantize", *floats, source, target, type_name, "1"]
    _run([str(part) for part in command], "", {"LD_LIBRARY_PATH": str(package / "lib")})


def ask(
    package: str,
    model: Path,
    tokens: Sequence[int],
    texts: Sequence[Text] = (),
    stops: Sequence[int] = (),
) -> Answer:
    """Logits of one token sequence, the runtime's tokenisation of texts, and at which ids it stops.

    Args:
        package: IK_LLAMA or LLAMA.
        model: a GGUF file.
        tokens: the sequence.
        texts: what to tokenise.
        stops: ids that may end a generation.

    Raises:
        RuntimeFailure: the runtime cannot load or run the model.
    """
    request = json.dumps({"tokens": list(tokens), "texts": list(texts), "stops": list(stops)})
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npy"
        output = _run([sys.executable, __file__, package, str(model), str(logits)], request, {})
        return Answer(np.load(logits), *json.loads(output.splitlines()[-1]))


def _run(command: Sequence[str], stdin: str, environment: dict[str, str]) -> str:
    result = subprocess.run(
        command, input=stdin, env=os.environ | environment, capture_output=True, text=True, timeout=_TIMEOUT
    )
    if result.returncode:
        last = "; ".join((result.stdout + result.stderr).strip().splitlines()[-3:])
        raise RuntimeFailure(f"{Path(command[0]).name} ended with {result.returncode}: {last}")
    return result.stdout


def _ik_llama_answer(model_path: str, request: dict[str, Any]) -> Answer:
    internals = importlib.import_module(f"{IK_LLAMA}._internals")
    tokens = request["tokens"]
    model = internals.IkModel(model_path)
    context = internals.IkContext(model, n_ctx=max(256, len(tokens)), n_threads=1, flash_attn=False)
    batch = internals.make_batch(tokens)
    for index in range(len(tokens)):
        batch.logits[index] = 1
    assert context.decode(batch) == 0
    rows = [np.ctypeslib.as_array(context.get_logits(i), (model.n_vocab,)).copy() for i in range(len(tokens))]
    ids = [model.tokenize(text, special=special, add_bos=bos) for text, special, bos in request["texts"]]
    is_end = importlib.import_module(f"{IK_LLAMA}._ctypes_api").llama_token_is_eog
    return Answer(np.stack(rows), ids, [id for id in request["stops"] if is_end(model.model, id)])


def _llama_answer(model_path: str, request: dict[str, Any]) -> Answer:
    tokens = request["tokens"]
    size = max(256, len(tokens))
    llama = importlib.import_module(LLAMA)
    model = llama.Llama(model_path, n_ctx=size, n_batch=size, n_threads=1, logits_all=True, verbose=False)
    model.eval(tokens)
    ids = [model.tokenize(text.encode(), special=special, add_bos=bos) for text, special, bos in request["texts"]]
    stops = [id for id in request["stops"] if llama.llama_vocab_is_eog(model._model.vocab, id)]
    return Answer(np.asarray(model.scores[: len(tokens)], dtype=np.float32), ids, stops)


def _answer(package: str, model_path: str, logits_path: str) -> None:
    answer = {IK_LLAMA: _ik_llama_answer, LLAMA: _llama_answer}[package](model_path, json.load(sys.stdin))
    np.save(logits_path, answer.logits)
    print(json.dumps([answer.ids, answer.stops]))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
