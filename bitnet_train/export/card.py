"""The model card, README.md: what the model is, how to run it, how it was made.

What a run left beside its result is read here: .hydra/config.yaml and metrics.jsonl. Where there is no run, the card of
the source folder takes its place. A card is public: it names no folder of a machine, and what others wrote (name,
licence, values of the configuration) is text in it and never markup.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bitnet_train.export.source import Source
from bitnet_train.export.targets import Target, readers
from bitnet_train.formats.metrics import read_events
from bitnet_train.formats.model_card import read_yaml, split_card
from bitnet_train.formats.private_paths import text_without_paths, without_path

_CARD = """---
{front_matter}
---
# {name}

A BitNet b1.58 model: ternary weights and int8 activations (W1.58A8). {contents}

## How to run it

{usage}

## Model

{model}
"""

_CONTENTS = {
    "safetensors autobitlinear": "The weights are packed in 2 bits, with one scale g for each matrix.",
    "safetensors bitlinear": "The weights are packed in 2 bits, with one inverse scale 1 / g for each matrix.",
    "master": "These are the float masters, for training on; the forward pass quantises them.",
}

_TRANSFORMERS = """`pip install torch transformers accelerate`, then:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```"""

_IK_LLAMA = """ik_llama.cpp computes with a type of its own; let it convert the file once:

    llama-quantize --allow-requantize --token-embedding-type f16 --output-tensor-type f16 {name} ik.gguf IQ2_BN
    llama-cli -m ik.gguf -p "Once upon a time"

"""

_BITNET = """bitnet.cpp runs the file as it is:

    python run_inference.py -m {name} -p "Once upon a time\""""

_LLAMA = """    llama-cli -m {name} -p "Once upon a time"          # {readers}"""

_MARKUP = re.compile(r"[\\`*~\[\]|#]|(?<![\w])_|_(?![\w])")
T = TypeVar("T")

_CONFIG_KEYS = {
    "recipe": "recipe_name",
    "started from": "init_from",
    "training data": "data.train",
    "validation data": "data.val",
    "seed": "seed",
    "rows per step": "global_batch_size",
    "positions per row": "data.sequence_length",
    "peak learning rate": "schedule.peak_lr",
}


def model_card(source: Source, target: Target, name: str, size: int) -> str:
    """The text of README.md.

    Args:
        source: the model.
        target: what it was exported to.
        name: the folder's or file's name.
        size: of the export, in bytes.
    """
    front_matter = {
        "library_name": "gguf" if target.format == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bitnet", "bitnet_train", "1.58-bit"],
        **({"license": source.licence} if source.licence else {}),
    }
    card = _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True, width=10**6).strip(),
        name=_escaped(without_path(source.name)),
        contents=_CONTENTS.get(str(target), f"GGUF, ternary matrices of type {target.variant.upper()}."),
        usage=_usage(source, target, name),
        model=_table(_shape(source, size)),
    )
    return card + _history(source)


def _usage(source: Source, target: Target, name: str) -> str:
    if target.format != "gguf":
        return _TRANSFORMERS.format(name=json.dumps(_in_one_line(name), ensure_ascii=False))
    file = shlex.quote(_in_one_line(name))
    if target.variant == "i2_s":
        ik_llama = _IK_LLAMA.format(name=file) if len(readers(source, target)) > 1 else ""
        return ik_llama + _BITNET.format(name=file)
    return _LLAMA.format(name=file, readers=", ".join(readers(source, target)))


def _shape(source: Source, size: int) -> dict[str, object]:
    config = source.config
    ternary = sum(prod(source.shapes[name]) for name in source.ternary_names)
    return {
        "parameters": f"{sum(map(prod, source.shapes.values())):,}, {ternary:,} of them ternary",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "feed-forward size": f"{config.intermediate_size}, {config.hidden_act}",
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "size": f"{size / 1e6:,.1f} MB",
    }


def _history(source: Source) -> str:
    """The run that made the model: data, metrics, configuration; or what the source's own card says."""
    run_dir = source.run_dir
    if run_dir is None or not (run_dir / ".hydra" / "config.yaml").is_file():
        body = text_without_paths(split_card(source.path)[1].strip())
        return f"\n## Card of the source\n\n{body}\n" if body else ""
    path = run_dir / ".hydra" / "config.yaml"
    config = _public(read_yaml(path, path.read_text(encoding="utf-8", errors="replace")))
    made = {label: _at(config, key) for label, key in _CONFIG_KEYS.items()}
    made = {label: value for label, value in made.items() if value is not None} | _last_metrics(run_dir)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6).strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    details = f"<details><summary>Configuration of the run</summary>\n\n{fence}yaml\n{text}\n{fence}\n\n</details>"
    return f"\n## How it was made\n\n{_table(made)}\n\n{details}\n"


def _last_metrics(run_dir: Path) -> dict[str, object]:
    """The last value of every metric of the run."""
    last: dict[str, float] = {}
    for event in read_events(run_dir):
        last |= event
    return {
        _escaped(name): f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for name, value in last.items()
    }


def _at(config: Mapping[str, Any], key: str) -> object:
    """The value at a dotted key; None where a part of it is absent."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _public(value: T) -> T:
    """A configuration without folders of the machine: of a path the last part stays, ids of the hub and URLs stay."""
    if isinstance(value, str):
        return _public_text(value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {_public(key): _public(entry) for key, entry in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [_public(entry) for entry in value]  # type: ignore[return-value]
    return value


def _public_text(text: str) -> str:
    text = text_without_paths(without_path(text))
    name, equals, path = text.rpartition("=")  # data.val=NAME=PATH
    parts = [part for part in path.split("/") if part]
    here = path.startswith(".") or os.path.exists(path) or len(parts) > 2
    return f"{name}{equals}{parts[-1]}" if here and len(parts) > 1 and "\n" not in text and "://" not in text else text


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_escaped(str(value))} |" for name, value in rows.items())])


def _in_one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _escaped(text: str) -> str:
    """The text in one line, and as Markdown shows it: no markup, no HTML, no cell of a table."""
    text = _MARKUP.sub(lambda match: f"\\{match[0]}", _in_one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;")
