"""Model folders for tests, written with the libraries that define the formats, not with this package's writers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}"
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "It's a small text about small things: the small cat sat on the small mat, 12345 times. " * 3

_ANIMALS = ("cat", "dog", "fox", "owl", "hen", "ant", "bee", "cow", "pig", "rat")
_STEPS = 40

LINEARS = 14  # the ternary matrices of the model below: two layers of seven
CODES = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)  # their weights


def write_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with 293 tokens, the last three of them special."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, EOT)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def random_model(config: BitNetConfig) -> BitNetForCausalLM:
    """A model in which every tensor is another one: the gains of norms random, the scale of each matrix its own."""
    model = BitNetForCausalLM(config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(1 + index / 10)
    return model.eval()


def write_master(
    folder: Path,
    fields: Mapping[str, int | str | bool] | None = None,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
) -> BitNetForCausalLM:
    """A folder of random masters with a tokenizer; `fields` change the tiny configuration. Returns the model."""
    tiny = {
        "vocab_size": 304,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **tiny,
        **(fields or {}),
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        },
    }
    model = random_model(BitNetConfig.from_json(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        write_tokenizer(folder)
    return model


def write_trained(folder: Path, fields: Mapping[str, int | str | bool], steps: int = _STEPS) -> list[str]:
    """A folder of masters that know ten texts by heart, and the texts: the next token is decided, not nearly a tie."""
    model = write_master(folder, fields)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [f"The {animal} number {n} sat on mat {n * n}. " * 3 for n, animal in enumerate(_ANIMALS, 11)]
    rows = [[tokenizer.token_to_id(BOS), *tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return texts


def edit_config(folder: Path, **fields: object) -> None:
    """Changes fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces a tensor of a folder, or removes it."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
