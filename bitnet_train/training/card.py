"""The README.md of a result folder: what the model is, how it was made, how it runs."""

from collections.abc import Sequence

from bitnet_train.model.config import BitNetConfig

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [bitnet, bitnet_train, 1.58-bit]
---
# BitNet b1.58, {recipe}

Master weights of a BitNet b1.58 decoder (ternary weights and int8 activations in the forward pass), made with
bitnet_train by the recipe `{recipe}`.

| | |
|---|---|
{rows}

These are the float masters, for training on. Export them to run them:

    python tools/export.py FOLDER OUT --format safetensors --verify             # transformers
    python tools/export.py FOLDER OUT.gguf --format gguf --type i2_s --verify   # bitnet.cpp, ik_llama.cpp
"""


def model_card(recipe: str, config: BitNetConfig, metrics: Sequence[dict[str, float]]) -> str:
    """The card, with the shape of the model and the last value of every metric of loss or reward."""
    last: dict[str, float] = {}
    for event in metrics:
        last.update(event)
    shape = {
        "hidden size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "feed-forward size": f"{config.intermediate_size}, {config.hidden_act}",
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "steps": int(last.get("step", 0)),
        "tokens": f"{int(last.get('tokens', 0)):,}",
    }
    figures = {name: f"{value:.4f}" for name, value in last.items() if name.endswith("loss") or "rewards/" in name}
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**shape, **figures}.items())
    return _CARD.format(recipe=recipe, rows=rows)
