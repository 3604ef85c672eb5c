"""An all-gather that moves ternary codes: a sixteenth of the bytes of float32 masters, an eighth of bfloat16's.

    a rank sends      ternary_codes(its rows, g), four in a byte, for every BitLinear; anything else as it is
    a rank receives   q g in float32, of which ternary_codes(q g, g) = q makes the codes again

g is that of the whole matrix: the ranks add up the sums of all rows of all layers in one all-reduce after an update,
and a BitLinear then knows its scale. The gradient goes straight through to the masters, of which every rank keeps its
rows. Codes and scales are those of a float32 gather, so that not a bit of the training differs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bitnet_train.formats.packing import VALUES_PER_BYTE, four_in_a_byte
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.quant import ternary_codes
from bitnet_train.training.sharding import absmeans

# Torch below 2.13 has it under another name, which warns in 2.13.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class Segment(NamedTuple):
    """Where a parameter's rows lie in the flat tensor that a rank gives to the gather of a layer.

    Attributes:
        values: how many values, zeros after the last row included.
        layer: the BitLinear whose weight it is, or None for a bias or a gain.
    """

    values: int
    layer: BitLinear | None

    @property
    def bytes(self) -> int:
        """What is sent of it."""
        return 4 * self.values if self.layer is None else -(-self.values // VALUES_PER_BYTE)

    def encode(self, values: Tensor) -> Tensor:
        """float32 `(values,)` to uint8 `(bytes,)`."""
        if self.layer is None:
            return values.view(torch.uint8)
        codes = F.pad(ternary_codes(values, self._scale), (0, -self.values % VALUES_PER_BYTE))
        return four_in_a_byte(codes.view(1, VALUES_PER_BYTE, -1))[0]

    def decode(self, sent: Tensor, values: Tensor) -> None:
        """uint8 `(bytes,)` into float32 `(values,)`."""
        if self.layer is None:
            values.view(torch.uint8).copy_(sent)
            return
        for k, quarter in enumerate(values.split(max(1, self.bytes))):
            quarter.copy_((sent[: len(quarter)] >> 2 * k) & 3).sub_(1).mul_(self._scale)

    @property
    def _scale(self) -> Tensor:
        assert self.layer is not None
        assert self.layer.scale is not None
        return self.layer.scale


class LowBitAllGather:
    """The gather of one decoder layer; FSDP2's interface for it (`FSDPModule.set_custom_all_gather`)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the rows of all ranks."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fills the output, float32 `(ranks * values,)`, with what every rank has as input `(values,)`."""
        sizes, bytes_of = [s.values for s in self.segments], [s.bytes for s in self.segments]
        values = input_tensor.split(sizes)
        sent = torch.cat([segment.encode(part) for segment, part in zip(self.segments, values, strict=True)])
        received = sent.new_empty(group.size(), len(sent))
        _all_gather(received.view(-1), sent, group=group)
        for row, gathered in zip(received, output_tensor.view(group.size(), -1), strict=True):
            for segment, part, target in zip(self.segments, row.split(bytes_of), gathered.split(sizes), strict=True):
                segment.decode(part, target)


def gather_codes(layers: nn.ModuleList) -> None:
    """Lets sharded decoder layers be gathered as codes; `refresh_scales` is due before the first and every update."""
    for layer in layers:
        assert isinstance(layer, FSDPModule)
        layer.set_custom_all_gather(LowBitAllGather(_segments(layer)))  # type: ignore[arg-type]


def _segments(layer: FSDPModule) -> list[Segment]:
    """The parameters of a layer in the order in which FSDP2 lays them out, which only its own state tells."""
    group = layer._get_fsdp_state()._fsdp_param_group
    assert group is not None
    return [
        Segment(
            parameter._sharded_param_data.numel(),
            module if parameter._module_info.param_name == "weight" and isinstance(module, BitLinear) else None,
        )
        for parameter in group.fsdp_params
        for module in [parameter._module_info.module]
    ]


@torch.no_grad()
def refresh_scales(model: nn.Module) -> None:
    """Gives every BitLinear the scale of its weight as it is now, in one all-reduce; all ranks call it together."""
    matrices = [module for module in model.modules() if isinstance(module, BitLinear)]
    for matrix, scale in zip(matrices, absmeans([matrix.weight for matrix in matrices]), strict=True):
        matrix.scale = scale
