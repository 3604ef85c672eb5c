"""The model card, README.md: what the model is, how to run it, how it was made.

What a run left beside its result is read here: .hydra/config.yaml and metrics.jsonl. Where there is no run, the card of
the source folder takes its place.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from bitnet_train.export.source import Source
from bitnet_train.export.targets import Target
from bitnet_train.formats.model_card import read_yaml, split_card

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

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```"""

_IK_LLAMA = """ik_llama.cpp computes with a type of its own; let it convert the file once:

    llama-quantize --allow-requantize --token-embedding-type f16 --output-tensor-type f16 {name} ik.gguf IQ2_BN
    llama-cli -m ik.gguf -p "Once upon a time"

bitnet.cpp runs the file as it is: `python run_inference.py -m {name} -p "Once upon a time"`."""

_LLAMA = """    llama-cli -m {name} -p "Once upon a time"          # {readers}"""

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
        "tags": "[bitnet, bitnet_train, 1.58-bit]",
        **({"license": source.licence} if source.licence else {}),
    }
    card = _CARD.format(
        front_matter="\n".join(f"{key}: {value}" for key, value in front_matter.items()),
        name=source.name,
        contents=_CONTENTS.get(str(target), f"GGUF, ternary matrices of type {target.variant.upper()}."),
        usage=_usage(source, target, name),
        model=_table(_shape(source, size)),
    )
    return card + _history(source)


def _usage(source: Source, target: Target, name: str) -> str:
    if target.format != "gguf":
        return _TRANSFORMERS.format(name=name)
    if target.variant == "i2_s":
        return _IK_LLAMA.format(name=name)
    return _LLAMA.format(name=name, readers=target.readers(source.config.hidden_act))


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
        body = split_card(source.path)[1].strip()
        return f"\n## Card of the source\n\n{body}\n" if body else ""
    path = run_dir / ".hydra" / "config.yaml"
    text = path.read_text(encoding="utf-8")
    made = {label: _at(read_yaml(path, text), key) for label, key in _CONFIG_KEYS.items()}
    made = {label: value for label, value in made.items() if value is not None} | _last_metrics(run_dir)
    details = f"<details><summary>Configuration of the run</summary>\n\n```yaml\n{text.strip()}\n```\n\n</details>"
    return f"\n## How it was made\n\n{_table(made)}\n\n{details}\n"


def _last_metrics(run_dir: Path) -> dict[str, object]:
    """The last value of every metric of the run, but for those of speed."""
    last: dict[str, float] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        last |= json.loads(line)
    return {name: f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for name, value in last.items()}


def _at(config: Mapping[str, Any], key: str) -> object:
    """The value at a dotted key; None where a part of it is absent."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
