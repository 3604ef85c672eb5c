"""The linear layers of the decoder: BitLinear (trained), TernaryLinear (frozen codes), and several of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet_train.fused import Stacked, normed_bit_linear, stack
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.norm import RMSNorm
from bitnet_train.quant import TernaryWeight, bit_linear, quantize_activation, quantize_weight, ternary_linear


class BitLinear(nn.Linear):
    """A linear layer with ternary weights and int8 activations in the forward pass, and a float master weight.

    Attributes:
        strength: lambda of the quantisation warm-up, from 0 (dense) to 1 (BitLinear), see `quant.bit_linear`.
        fuses: whether norm and residual may be computed with it; where not, forward hooks see its input.
        keeps_codes: whether codes are kept from one forward pass to the next, until `forget_codes`.
        scale: the scale of the weight, float32, shape (), where somebody else keeps it up to date; else it is computed.
    """

    strength = 1.0
    fuses = True
    keeps_codes = False
    scale: Tensor | None = None
    _kept: "_Kept | None" = None

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        if self.strength < 1.0:
            return bit_linear(input, [self.weight], [self.bias], self.strength)[0]
        return normed_bit_linear(input, [self.weight], bias=self.bias, stacked=stack([self.weight], [self.scale]))

    def stacked_with(self, others: Sequence["BitLinear"]) -> Stacked:
        """The codes of this layer's weight and of the others', made anew unless they are kept."""
        weights: list[Tensor] = [self.weight, *(layer.weight for layer in others)]
        if not self.keeps_codes or torch.is_inference_mode_enabled():  # a later backward pass could not save them
            return stack(weights, [self.scale, *(layer.scale for layer in others)])
        state = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
        if self._kept is None or self._kept.state != state:
            self._kept = _Kept(stack(weights), [weight.detach() for weight in weights], state)
        return self._kept.stacked


@dataclass(frozen=True)
class _Kept:
    """Codes, the weights that they are of, held so that no other can take their place in memory, and their state."""

    stacked: Stacked
    weights: list[Tensor]
    state: list[tuple[int, int, int]]


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


def fusible(*layers: nn.Module) -> bool:
    """Whether `fused_linear` can compute these layers: BitLinears at full strength that fuse."""
    return all(isinstance(layer, BitLinear) and layer.strength == 1.0 and layer.fuses for layer in layers)


def fused_linear(
    x: Tensor,
    layers: Sequence[nn.Linear],
    norm: RMSNorm,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """BitLinears that read one input, norm and residual included: `(..., in)` to `(..., sum out)`, see `fused`."""
    first, *others = [layer for layer in layers if isinstance(layer, BitLinear)]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return normed_bit_linear(
        x,
        [layer.weight for layer in layers],
        norm=norm.norm,
        activation=activation,
        residual=residual,
        bias=torch.cat(biases) if biases else None,
        stacked=first.stacked_with(others),
    )


def set_strength(model: nn.Module, strength: float) -> None:
    """Sets lambda of every BitLinear: v + lambda (q(v) - v), the quantisation warm-up from a dense model."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.strength = strength


def keep_codes(model: nn.Module, keep: bool = True) -> None:
    """Lets BitLinears keep their codes while weights stand still: several micro-batches, or a recomputed forward pass.

    Whoever switches this on calls `forget_codes` after every update: not every optimizer leaves a trace in the weight.
    """
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.keeps_codes, module._kept = keep, None


def forget_codes(model: nn.Module) -> None:
    """Drops kept codes; the next forward pass quantises again."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module._kept = None


def freeze(model: nn.Module) -> nn.Module:
    """Replaces every BitLinear of the model by its TernaryLinear, in place: inference without quantising again."""
    for name, child in list(model.named_children()):
        if isinstance(child, BitLinear):
            setattr(model, name, TernaryLinear.freeze(child))
        else:
            freeze(child)
    return model
