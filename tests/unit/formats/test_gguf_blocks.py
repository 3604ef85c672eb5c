"""I2_S and the float types, byte by byte, and against an oracle written from the layout's description."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.formats.gguf_blocks import (
    GGMLType,
    pack_float,
    pack_i2_s,
    tensor_bytes,
    unpack_float,
    unpack_i2_s,
)


def oracle(codes: np.ndarray, scale: float) -> bytes:
    """I2_S, a byte at a time: n / 4 bytes of blocks, the scale, and zeros to n / 4 + 32."""
    flat = [int(code) + 1 for code in codes.reshape(-1)]
    out = bytearray(len(flat) // 4 + 32)
    for index, code in enumerate(flat):
        block, place = divmod(index, 128)
        group, byte = divmod(place, 32)
        out[block * 32 + byte] |= code << (6 - 2 * group)
    struct.pack_into("<f", out, len(flat) // 4, scale)
    return bytes(out)


def test_literal_bytes() -> None:
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, [0, 32, 64, 96]] = torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    codes[0, 31] = -1
    expected = bytes([0b10_00_01_10]) + bytes([0b01_01_01_01]) * 30 + bytes([0b00_01_01_01])
    assert pack_i2_s(codes, 0.5) == expected + b"\x00\x00\x00\x3f" + bytes(28)


@given(st.integers(1, 4), st.integers(1, 3), st.floats(2**-16, 100, width=32), st.integers(0, 2**32 - 1))
def test_matches_the_oracle_and_unpacks(rows: int, blocks: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, 128 * blocks), dtype=torch.int8, generator=generator)
    before = codes.clone()
    data = pack_i2_s(codes, scale)
    assert data == oracle(codes.numpy(), scale)
    assert len(data) == tensor_bytes(GGMLType.I2_S, (rows, 128 * blocks)) == codes.numel() // 4 + 32
    assert torch.equal(codes, before)
    unpacked, unpacked_scale = unpack_i2_s(data, (rows, 128 * blocks))
    assert torch.equal(unpacked, codes)
    assert unpacked_scale == scale


def test_a_row_must_be_a_multiple_of_the_block() -> None:
    with pytest.raises(ValueError, match="multiple of 128 for I2_S, got 64"):
        pack_i2_s(torch.zeros(2, 64, dtype=torch.int8), 1.0)


def test_wrong_size_and_bytes_that_are_no_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes, got 63"):
        unpack_i2_s(bytes(63), (1, 128))
    with pytest.raises(ValueError, match="got 3"):
        unpack_i2_s(bytes([0b11]) + bytes(63), (1, 128))


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
    assert unpack_float(data, kind, (2, 1)).tolist() == [[1.0], [-2.0]]


def test_a_float_that_is_stored_by_columns_is_written_by_rows() -> None:
    values = torch.arange(6.0).reshape(2, 3).t()
    assert np.frombuffer(pack_float(values, GGMLType.F32), "<f4").tolist() == [0, 3, 1, 4, 2, 5]


def test_a_value_beyond_the_type_is_refused() -> None:
    with pytest.raises(ValueError, match="range of F16, got a magnitude of 70000"):
        pack_float(torch.tensor([1.0, -70000.0]), GGMLType.F16)
