"""The float types of GGUF, byte by byte, and the sizes of all types."""

import numpy as np
import pytest
import torch

from bitnet_train.formats.gguf_blocks import GGMLType, pack_float, tensor_bytes, unpack_float


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GGMLType.F32, b"\x00\x00\x80\x3f\x00\x00\x00\xc0"),
        (GGMLType.F16, b"\x00\x3c\x00\xc0"),
        (GGMLType.BF16, b"\x80\x3f\x00\xc0"),
    ],
)
def test_floats(kind: GGMLType, expected: bytes) -> None:
    values = torch.tensor([[1.0], [-2.0]])
    data = pack_float(values, kind)
    assert data == expected
    assert len(data) == tensor_bytes(kind, (2, 1))
    assert unpack_float(np.frombuffer(bytearray(data), np.uint8), kind, (2, 1)).tolist() == [[1.0], [-2.0]]


def test_sizes() -> None:
    sizes = {kind: tensor_bytes(kind, (3, 512)) for kind in GGMLType}
    assert sizes == {
        GGMLType.F32: 6144,
        GGMLType.F16: 3072,
        GGMLType.BF16: 3072,
        GGMLType.TQ1_0: 6 * 54,
        GGMLType.TQ2_0: 6 * 66,
        GGMLType.I2_S: 384 + 32,
    }


@pytest.mark.parametrize(("kind", "block"), [(GGMLType.I2_S, 128), (GGMLType.TQ1_0, 256), (GGMLType.TQ2_0, 256)])
def test_a_row_must_be_a_multiple_of_the_block(kind: GGMLType, block: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {block} for {kind.name}, got {block // 2}"):
        tensor_bytes(kind, (2, block // 2))


def test_a_float_that_is_stored_by_columns_is_written_by_rows() -> None:
    values = torch.arange(6.0).reshape(2, 3).t()
    assert np.frombuffer(pack_float(values, GGMLType.F32), "<f4").tolist() == [0, 3, 1, 4, 2, 5]


def test_a_value_beyond_the_type_is_refused() -> None:
    with pytest.raises(ValueError, match="range of F16, got a magnitude of 70000"):
        pack_float(torch.tensor([1.0, -70000.0]), GGMLType.F16)
