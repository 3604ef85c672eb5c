"""Whether ternary training is alive: what the codes and the activations of every decoder layer do.

    minus, zero, plus      share of the codes -1, 0, +1
    flip_rate              share of the codes that are others than at the last measurement
    threshold_distance     mean of | |W| / g - 1/2 |: how far a latent weight is from another code, in units of g
    scale                  g, the mean over the matrices
    activation_absmax      largest absmax of a token at the input of a BitLinear
    activation_saturation  share of the int8 codes that are -127 or 127: 1 / width where one outlier sets the scale

A layer's figures are named health/layers.N/..., those of all layers health/... . Weights are measured whole,
activations in a forward pass of its own over the first 256 positions of one row.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.data.batches import TokenBatch
from bitnet_train.formats.packing import VALUES_PER_BYTE, pack_ternary
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import INT8_MAX, quantize_activation, quantize_weight

Metrics = dict[str, float]

_POSITIONS = 256
_LOWER_BITS = 0b01010101  # the lower one of each pair
NAMES = (
    *("minus", "zero", "plus", "flip_rate", "threshold_distance", "scale"),
    *("activation_absmax", "activation_saturation"),
)


class TernaryHealth:
    """Measures a decoder every `every` optimizer steps; 0 never does.

    Attributes:
        codes: the packed codes of the last measurement, by name of the matrix; part of a checkpoint.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.codes: dict[str, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` updates is to be measured."""
        return self.every > 0 and step % self.every == 0

    @torch.no_grad()
    def start(self, model: BitNetForCausalLM) -> None:
        """Flips are counted from the codes as they are now, unless earlier ones came with a checkpoint."""
        if self.every > 0 and not self.codes:
            named = _bit_linears(model.model.layers)
            self.codes = {name: pack(quantize_weight(layer.weight).codes) for name, layer in named}

    @torch.no_grad()
    def measure(self, model: BitNetForCausalLM, batch: TokenBatch) -> Metrics:
        """The figures of every layer and of all together; none for a model without BitLinears (the dense twin)."""
        layers = model.model.layers
        weights = [self._weight_sums(f"{index}.", layer) for index, layer in enumerate(layers)]
        if not any(row.any() for row in weights):
            return {}
        table = torch.stack([torch.cat(row) for row in zip(weights, activation_sums(model, batch), strict=True)])
        whole = torch.cat((table[:, :-1].sum(dim=0), table[:, -1].amax(dim=0, keepdim=True)))
        figures = _figures(torch.cat((table, whole[None]))).tolist()
        prefixes = [*(f"health/layers.{index}/" for index in range(len(layers))), "health/"]
        return {
            f"{prefix}{name}": value
            for prefix, row in zip(prefixes, figures, strict=True)
            for name, value in zip(NAMES, row, strict=True)
        }

    def _weight_sums(self, prefix: str, layer: nn.Module) -> Tensor:
        """Sums over the matrices of a layer, float64: -1, 0, +1, flips, distances, weights, scales, matrices."""
        sums = torch.zeros(8, dtype=torch.float64, device=next(layer.parameters()).device)
        for name, matrix in _bit_linears(layer):
            codes, scale = quantize_weight(matrix.weight)
            packed = pack(codes)
            flipped = flips(self.codes.get(prefix + name, packed), packed)
            distance = (matrix.weight.abs() / scale - 0.5).abs().sum()
            minus, plus = torch.count_nonzero(codes < 0), torch.count_nonzero(codes > 0)
            count = torch.full_like(minus, codes.numel())
            of_matrix = (minus, count - minus - plus, plus, flipped, distance, count, scale, torch.ones_like(scale))
            sums += torch.stack([value.double() for value in of_matrix])
            self.codes[prefix + name] = packed
        return sums


def activation_sums(model: BitNetForCausalLM, batch: TokenBatch) -> list[Tensor]:
    """What enters the BitLinears of every layer, float64 `(3,)`: saturated codes, codes, the largest absmax."""
    layers = model.model.layers
    noted: list[list[Tensor]] = [[] for _ in layers]
    ids, _, positions, documents = (field[:1, :_POSITIONS] for field in batch)
    with ExitStack() as stack:
        stack.enter_context(_apart(model))
        for index, layer in enumerate(layers):
            for _, linear in _bit_linears(layer):
                handle = linear.register_forward_pre_hook(partial(_note, noted[index]))
                stack.callback(handle.remove)
        model.model(ids, position_ids=positions, document_ids=documents)
    rows = [torch.stack(layer) for layer in noted]
    return [torch.cat((row[:, :2].sum(dim=0), row[:, 2].amax(dim=0, keepdim=True))) for row in rows]


@contextmanager
def _apart(model: BitNetForCausalLM) -> Iterator[None]:
    """Evaluation mode, with every BitLinear called by itself, so that its hooks run."""
    was_training, linears = model.training, [linear for _, linear in _bit_linears(model)]
    model.eval()
    for linear in linears:
        linear.fuses = False
    try:
        yield
    finally:
        model.train(was_training)
        for linear in linears:
            linear.fuses = True


def _figures(table: Tensor) -> Tensor:
    """Rows of `_weight_sums` and `activation_sums` to rows of `NAMES`."""
    weights, scale, matrices, saturated, values, absmax = table[:, 5:].t()
    return torch.cat((table[:, :5].t() / weights, torch.stack((scale / matrices, absmax, saturated / values)))).t()


def _note(noted: list[Tensor], module: nn.Module, inputs: tuple[Tensor]) -> None:
    """A hook before a forward pass."""
    codes = quantize_activation(inputs[0]).codes
    saturated = torch.count_nonzero(codes.abs() == INT8_MAX)
    sums = (saturated, torch.full_like(saturated, codes.numel()), inputs[0].abs().max())
    noted.append(torch.stack([value.double() for value in sums]))


def _bit_linears(module: nn.Module) -> list[tuple[str, BitLinear]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, BitLinear)]


def pack(codes: Tensor) -> Tensor:
    """Codes of any shape to a quarter of the bytes, uint8 `(ceil(n / 4), 1)`."""
    flat = codes.flatten()
    return pack_ternary(F.pad(flat, (0, -flat.numel() % VALUES_PER_BYTE))[:, None])


def flips(before: Tensor, after: Tensor) -> Tensor:
    """How many codes differ between two results of `pack`: int64, shape ()."""
    differs = before ^ after
    differs = (differs | differs >> 1) & _LOWER_BITS
    return torch.stack([torch.count_nonzero(differs >> 2 * k & 1) for k in range(VALUES_PER_BYTE)]).sum()
