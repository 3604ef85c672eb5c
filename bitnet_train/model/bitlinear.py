"""The linear layers of the decoder: BitLinear (trained), TernaryLinear (frozen codes), and several of them at once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitnet_train.model.config import BitNetConfig
from bitnet_train.quant import TernaryWeight, bit_linear, quantize_activation, quantize_weight, ternary_linear


class BitLinear(nn.Linear):
    """A linear layer with ternary weights and int8 activations in the forward pass, and a float master weight."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`; see `quant.bit_linear`."""
        return bit_linear(input, [self.weight], [self.bias])[0]


class TernaryLinear(nn.Module):
    """A BitLinear without its master: int8 codes `(out, in)` and one float32 scale. Inference only."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: TernaryWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.bias = bias

    @classmethod
    def freeze(cls, layer: BitLinear) -> "TernaryLinear":
        """The same function as the layer's, quantised once."""
        return cls(quantize_weight(layer.weight), None if layer.bias is None else layer.bias.detach())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)` in the dtype of x."""
        return ternary_linear(quantize_activation(x), TernaryWeight(self.codes, self.scale), self.bias, x.dtype)


def linear(config: BitNetConfig, in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """A BitLinear, or a plain Linear in the dense twin."""
    layer = BitLinear if config.quantize else nn.Linear
    return layer(in_features, out_features, bias=bias)


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Applies layers that read the same input: BitLinears quantise it once for all of them."""
    if all(isinstance(layer, BitLinear) for layer in layers):
        bit_linears = [layer for layer in layers if isinstance(layer, BitLinear)]
        return bit_linear(x, [layer.weight for layer in bit_linears], [layer.bias for layer in bit_linears])
    return [layer(x) for layer in layers]


def freeze(model: nn.Module) -> nn.Module:
    """Replaces every BitLinear of the model by its TernaryLinear, in place: inference without quantising again."""
    for name, child in list(model.named_children()):
        if isinstance(child, BitLinear):
            setattr(model, name, TernaryLinear.freeze(child))
        else:
            freeze(child)
    return model
