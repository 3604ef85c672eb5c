"""Whether ternary training is alive: what the codes and the activations of every decoder layer do.

    minus, zero, plus      share of the codes -1, 0, +1
    flip_rate              share of the codes that are others than at the last measurement
    threshold_distance     mean of | |W| / g - 1/2 |: how far a latent weight is from another code, in units of g
    scale                  g, the mean over the matrices
    activation_absmax      largest absmax of a token at the input of a BitLinear
    activation_saturation  share of the int8 codes that are -127 or 127: 1 / width where one outlier sets the scale

A layer's figures are named health/layers.N/..., those of all layers health/... . Weights are measured whole (of sharded
ones every rank measures its rows), activations in a forward pass of its own over the first 256 positions of one row.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.data.batches import TokenBatch
from bitnet_train.formats.packing import VALUES_PER_BYTE, four_in_a_byte
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import INT8_MAX, quantize_activation, ternary_codes
from bitnet_train.training.sharding import absmeans, own_part, total

Metrics = dict[str, float]
Scaled = tuple[str, Tensor, Tensor]  # a matrix: its name, its weight, which may be sharded, and its scale

_POSITIONS = 256
_LOWER_BITS = 0b01010101  # the lower one of each pair
NAMES = (
    *("minus", "zero", "plus", "flip_rate", "threshold_distance", "scale"),
    *("activation_absmax", "activation_saturation"),
)


class TernaryHealth:
    """Measures a decoder every `every` optimizer steps; 0 never does.

    Attributes:
        codes: the packed codes of the last measurement, by name of the matrix (of its rows on this rank); part of a
            checkpoint.
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
            weights = {name: matrix.weight for name, matrix in _bit_linears(model.model.layers)}
            scales = absmeans(list(weights.values()))
            self.codes = {
                name: pack(ternary_codes(own_part(weight), scale))
                for (name, weight), scale in zip(weights.items(), scales, strict=True)
            }

    @torch.no_grad()
    def measure(self, model: BitNetForCausalLM, batch: TokenBatch) -> Metrics:
        """The figures of every layer and of all together; none for a model without BitLinears (the dense twin)."""
        layers = model.model.layers
        matrices = [
            [(f"{index}.{name}", m.weight) for name, m in _bit_linears(layer)] for index, layer in enumerate(layers)
        ]
        if not any(matrices):
            return {}
        scales = iter(absmeans([weight for layer in matrices for _, weight in layer]))
        weights = self._weight_sums([[(name, weight, next(scales)) for name, weight in layer] for layer in matrices])
        table = torch.cat((weights, torch.stack(activation_sums(model, batch))), dim=1)
        whole = torch.cat((table[:, :-1].sum(dim=0), table[:, -1].amax(dim=0, keepdim=True)))
        figures = _figures(torch.cat((table, whole[None]))).tolist()
        prefixes = [*(f"health/layers.{index}/" for index in range(len(layers))), "health/"]
        return {
            f"{prefix}{name}": value
            for prefix, row in zip(prefixes, figures, strict=True)
            for name, value in zip(NAMES, row, strict=True)
        }

    def _weight_sums(self, layers: Sequence[Sequence[Scaled]]) -> Tensor:
        """Sums over the matrices of every layer, float64: -1, 0, +1, flips, distances, weights, scales, matrices."""
        counts = torch.stack([torch.stack([self._counts(*matrix) for matrix in layer]).sum(dim=0) for layer in layers])
        scales = torch.stack([torch.stack([scale.double() for *_, scale in layer]).sum() for layer in layers])
        numbers = torch.tensor([len(layer) for layer in layers], device=counts.device)
        _, weight, _ = layers[0][0]
        return torch.cat((total(counts, like=weight), scales[:, None], numbers[:, None]), dim=1)

    def _counts(self, name: str, weight: Tensor, scale: Tensor) -> Tensor:
        """The first six of `_weight_sums` over a matrix, or over the rows of it that lie here."""
        part = own_part(weight)
        codes = ternary_codes(part, scale)
        packed = pack(codes)
        flipped = flips(self.codes.get(name, packed), packed)
        distance = (part.abs() / scale - 0.5).abs().sum()
        minus, plus = torch.count_nonzero(codes < 0), torch.count_nonzero(codes > 0)
        count = torch.full_like(minus, codes.numel())
        self.codes[name] = packed
        counts = (minus, count - minus - plus, plus, flipped, distance, count)
        return torch.stack([value.double() for value in counts])


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
    """Codes `(rows, columns)` to a quarter of the bytes, row by row, uint8 `(rows, ceil(columns / 4))`."""
    padded = F.pad(codes, (0, -codes.shape[1] % VALUES_PER_BYTE))
    return four_in_a_byte(padded.unflatten(1, (VALUES_PER_BYTE, -1)).unbind(dim=1))


def flips(before: Tensor, after: Tensor) -> Tensor:
    """How many codes differ between two results of `pack`: int64, shape ()."""
    differs = before ^ after
    differs = (differs | differs >> 1) & _LOWER_BITS
    return torch.stack([torch.count_nonzero(differs >> 2 * k & 1) for k in range(VALUES_PER_BYTE)]).sum()
