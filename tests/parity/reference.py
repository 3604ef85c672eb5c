"""transformers' BitNetForCausalLM with the weights of one of our models, and inputs on which the two can be compared.

Rounding makes a network chaotic: where an activation lies on the edge between two codes, the last bit of a float
decides, and one code that differs moves a logit by a hundredth. `quiet_ids` draws tokens until no activation lies near
an edge; on those, two implementations of one function have all codes in common and agree as closely as dense models do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear
from transformers.utils.quantization_config import BitNetQuantConfig

from bitnet_train.model.decoder import BitNetForCausalLM

EDGE = 1e-4  # codes: about the float32 error of x s, which is at most 127
_TRIES = 200


def theirs(ours: BitNetForCausalLM) -> nn.Module:
    """transformers' model with our weights, in training mode; its linears quantise online where ours do."""
    json = ours.config.to_json()
    quantization = json.pop("quantization_config", None)
    config = transformers.BitNetConfig(**json, bos_token_id=0, eos_token_id=1)
    config._attn_implementation = "eager"
    model = transformers.BitNetForCausalLM(config)
    if quantization is not None:
        quantization.pop("quant_method")
        replace_with_bitnet_linear(model.model, [], BitNetQuantConfig(**quantization))
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if ours.config.tie_word_embeddings else [])
    model.tie_weights()
    model.train()
    assert isinstance(model, nn.Module)
    return model


def randomize(model: nn.Module) -> None:
    """Biases and gains, which models begin with at 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)


@contextmanager
def bitlinear_inputs(reference: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fills a mapping with what each AutoBitLinear reads, by the layer's name, while the reference runs."""
    names: dict[nn.Module, str] = {m: name for name, m in reference.named_modules() if isinstance(m, AutoBitLinear)}
    inputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        inputs[names[module]] = args[0].detach()

    handles = [module.register_forward_pre_hook(keep) for module in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def distance_to_an_edge(reference: nn.Module, ids: Tensor) -> float:
    """The least distance of any x s to a number that ends in a half; 0.5 at most, also for a dense model."""
    with bitlinear_inputs(reference) as inputs:
        reference(ids)
    distance = 0.5
    for x in inputs.values():
        scaled = x * (127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5))
        distance = min(distance, float((scaled - scaled.floor() - 0.5).abs().min()))
    return distance


def quiet_ids(reference: nn.Module, *shape: int) -> Tensor:
    """Random token ids on which no activation of the reference lies within `EDGE` of an edge between two codes."""
    vocabulary = reference.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for _ in range(_TRIES):
        ids = torch.randint(0, vocabulary, shape)
        if distance_to_an_edge(reference, ids) > EDGE:
            return ids
    raise AssertionError(f"no quiet input of shape {shape} in {_TRIES} draws; use fewer tokens or features")


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got is not None
    assert want is not None
    return float(((got - want).norm() / want.norm().clamp(min=1e-12)).item())
