"""A folder or file that holds no model of ours, called by its name: what it is, and what to give instead."""

from pathlib import Path

_MARKS = (  # a file or folder that is there, what that tells, what to do; the most telling first
    (
        "adapter_config.json",
        "a PEFT adapter, which needs its base model",
        "merge the two with PEFT, and give the result",
    ),
    ("model_index.json", "a diffusers pipeline", "give a language model"),
    ("modules.json", "a sentence-transformers model", "give a decoder"),
    ("multirun.yaml", "the directory of a sweep", "give one of the runs in it"),
    ("snapshots", "a folder of the hub's cache", "give the folder under snapshots/"),
    ("state.pt", "a checkpoint", "give it to tools/export.py"),
    ("checkpoints", "the directory of a run that has not finished", "let it end, or give a checkpoint of it"),
    ("params.json", "weights as Meta or Mistral publish them", "convert them to safetensors with transformers"),
    ("pytorch_model.bin", "weights in a pickle, without config.json", "save the model again with transformers"),
    ("model.safetensors", "weights without config.json", "add the config.json of the model"),
    ("model.safetensors.index.json", "weights without config.json", "add the config.json of the model"),
    ("tf_model.h5", "a TensorFlow model", "save it again with transformers and PyTorch"),
    ("flax_model.msgpack", "a Flax model", "save it again with transformers and PyTorch"),
    ("optimizer.pt", "the state of a trainer", "give the model that it saved"),
    ("dataset_info.json", "a data set", "give a model"),
    ("tokenizer.json", "a tokenizer alone", "give the model's folder"),
    ("tokenizer.model", "a tokenizer alone", "give the model's folder"),
)
_SUFFIXES = (
    ("*.gguf", "a folder of GGUF files", "give one of the files"),
    ("step-*", "a folder of checkpoints", "give one of them"),
    ("*.onnx", "an ONNX model", "give a folder of safetensors"),
    ("*.safetensors", "weights without config.json", "add the config.json of the model"),
    ("*.jsonl", "a folder of rows", "give a model"),
)


def what_it_is(path: Path) -> str:
    """The name of a path that holds no config.json, and what to give instead."""
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return f"it is {_kind_of_file(path)}"
    found = [(what, remedy) for mark, what, remedy in _MARKS if (path / mark).exists()]
    found += [(what, remedy) for pattern, what, remedy in _SUFFIXES if any(path.glob(pattern))]
    if found:
        what, remedy = found[0]
        return f"it is {what}; {remedy}"
    inside = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
    if inside:
        return f"it is a folder of models; give one of them, such as {path / inside[0]}"
    return "the folder is empty" if not any(path.iterdir()) else "nothing in it is known here"


def _kind_of_file(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "a file of weights; give the folder that it is in"
    return "a file that is no GGUF; give a folder, or a file that begins with GGUF"
