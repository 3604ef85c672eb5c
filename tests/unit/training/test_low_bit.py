"""What travels in a gather of codes; tests/parallel has the gather itself."""

import pytest
import torch

from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.quant import quantize_weight, ternary_codes
from bitnet_train.training.low_bit import Segment


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 1), (2, 7)])
def test_codes_and_scale_arrive(shape: tuple[int, int]) -> None:
    weight, layer = torch.randn(shape), BitLinear(shape[1], shape[0], bias=False)
    codes, layer.scale = quantize_weight(weight)
    segment = Segment(weight.numel(), layer)
    sent, received = segment.encode(weight.flatten()), torch.empty(weight.numel())
    segment.decode(sent, received)
    assert len(sent) == segment.bytes == -(-weight.numel() // 4)
    assert torch.equal(received.view(shape), codes * layer.scale)
    assert torch.equal(ternary_codes(received, layer.scale).view(shape), codes)


def test_what_is_no_ternary_weight_arrives_as_it_is() -> None:
    gains, segment = torch.randn(5), Segment(5, None)
    received = torch.empty(5)
    segment.decode(segment.encode(gains), received)
    assert torch.equal(received, gains)


def test_rows_that_fill_a_shard_up_are_zeros() -> None:
    layer = BitLinear(3, 2, bias=False)
    layer.scale = torch.tensor(0.5)
    segment, received = Segment(6, layer), torch.empty(6)
    segment.decode(segment.encode(torch.tensor([1.0, -1.0, 0.1, 0.0, 0.0, 0.0])), received)
    assert received.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
