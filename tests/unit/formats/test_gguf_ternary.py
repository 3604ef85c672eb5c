"""The ternary types of GGUF by their literal bytes, and against others' implementations of the layouts.

I2_S: an oracle in numpy, written from the layout's description. TQ1_0 and TQ2_0: the gguf library.
"""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.formats.gguf_blocks import GGMLType, tensor_bytes
from bitnet_train.formats.gguf_ternary import Ternary, pack_ternary_blocks, unpack_ternary_blocks

TYPES = [GGMLType.I2_S, GGMLType.TQ1_0, GGMLType.TQ2_0]


def i2_s_oracle(codes: np.ndarray, scale: float) -> bytes:
    """I2_S, a byte at a time: n / 4 bytes of blocks, the scale, and zeros to n / 4 + 32."""
    flat = [int(code) + 1 for code in codes.reshape(-1)]
    out = bytearray(len(flat) // 4 + 32)
    for index, code in enumerate(flat):
        block, place = divmod(index, 128)
        group, byte = divmod(place, 32)
        out[block * 32 + byte] |= code << (6 - 2 * group)
    struct.pack_into("<f", out, len(flat) // 4, scale)
    return bytes(out)


def library_oracle(kind: GGMLQuantizationType) -> Callable[[np.ndarray, float], bytes]:
    return lambda codes, scale: quants.quantize((codes * np.float32(scale)).astype(np.float32), kind).tobytes()


ORACLES = {
    GGMLType.I2_S: i2_s_oracle,
    GGMLType.TQ1_0: library_oracle(GGMLQuantizationType.TQ1_0),
    GGMLType.TQ2_0: library_oracle(GGMLQuantizationType.TQ2_0),
}


def unpack(kind: GGMLType, data: bytes | memoryview, shape: tuple[int, ...]) -> Ternary:
    return unpack_ternary_blocks(kind, np.frombuffer(bytearray(data), np.uint8), shape)


def zeros_but(columns: int, **at: int) -> torch.Tensor:
    """Codes `(1, columns)`: zero, but for those at `c<place>`."""
    codes = torch.zeros(1, columns, dtype=torch.int8)
    for place, code in at.items():
        codes[0, int(place[1:])] = code
    return codes


def test_literal_bytes_of_i2_s() -> None:
    codes = zeros_but(128, c0=1, c32=-1, c64=0, c96=1, c31=-1)
    expected = bytes([0b10_00_01_10]) + bytes([0b01_01_01_01]) * 30 + bytes([0b00_01_01_01])
    assert pack_ternary_blocks(GGMLType.I2_S, codes, 0.5) == expected + b"\x00\x00\x00\x3f" + bytes(28)


def test_literal_bytes_of_tq2_0() -> None:
    codes = zeros_but(256, c0=1, c32=-1, c96=1, c129=-1)
    expected = bytes([0b10_01_00_10]) + bytes([0b01_01_01_01]) * 32 + bytes([0b01_01_01_00])
    expected += bytes([0b01_01_01_01]) * 30
    assert pack_ternary_blocks(GGMLType.TQ2_0, codes, 0.5) == expected + b"\x00\x38"


def test_literal_bytes_of_tq1_0() -> None:
    codes = zeros_but(256, c0=1, c32=-1, c64=0, c96=1, c128=-1, c160=1, c255=-1)
    # 121 = 81 + 27 + 9 + 3 + 1 and 120 = 81 + 27 + 9 + 3 are the bytes of zeros
    first, sixth = 81 * 2 + 27 * 0 + 9 * 1 + 3 * 2 + 0, 81 * 2 + 27 + 9 + 3 + 1
    last = 81 + 27 + 9
    values = [first] + [121] * 31 + [sixth] + [121] * 15 + [120] * 3 + [last]
    expected = bytes(-(-value * 256 // 243) for value in values)
    assert pack_ternary_blocks(GGMLType.TQ1_0, codes, 0.5) == expected + b"\x00\x38"


@pytest.mark.parametrize("kind", TYPES)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(2**-10, 100, width=16), st.integers(0, 2**32 - 1))
def test_matches_the_oracle_and_unpacks(kind: GGMLType, rows: int, blocks: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, 256 * blocks), dtype=torch.int8, generator=generator)
    before = codes.clone()
    data = pack_ternary_blocks(kind, codes, scale)
    assert data == ORACLES[kind](codes.numpy(), scale)
    assert len(data) == tensor_bytes(kind, (rows, 256 * blocks))
    assert torch.equal(codes, before)
    unpacked, unpacked_scale = unpack(kind, data, (rows, 256 * blocks))
    assert torch.equal(unpacked, codes)
    assert unpacked_scale == scale


@pytest.mark.parametrize("kind", TYPES)
def test_a_matrix_of_zeros_keeps_its_scale(kind: GGMLType) -> None:
    codes = torch.zeros(2, 256, dtype=torch.int8)
    unpacked, scale = unpack(kind, pack_ternary_blocks(kind, codes, 0.25), (2, 256))
    assert scale == 0.25
    assert not unpacked.any()


def test_the_scale_is_rounded_to_the_type() -> None:
    codes = torch.ones(1, 256, dtype=torch.int8)
    for kind, rounded in ((GGMLType.I2_S, np.float32(0.1)), (GGMLType.TQ2_0, np.float16(0.1))):
        assert unpack(kind, pack_ternary_blocks(kind, codes, 0.1), (1, 256)).scale == rounded
    with pytest.raises(ValueError, match="scale must be within the range of F16, got 70000"):
        pack_ternary_blocks(GGMLType.TQ1_0, codes, 70000.0)


def test_wrong_size_and_bytes_that_are_no_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes, got 63"):
        unpack(GGMLType.I2_S, bytes(63), (1, 128))
    with pytest.raises(ValueError, match="got 3"):
        unpack(GGMLType.I2_S, bytes([0b11]) + bytes(63), (1, 128))
    with pytest.raises(ValueError, match="got 3"):
        unpack(GGMLType.TQ2_0, bytes([0b11]) + bytes(65), (1, 256))
    with pytest.raises(ValueError, match="must have the matrix's scale, got several"):
        unpack(GGMLType.TQ2_0, bytes(66) + bytes(64) + b"\x00\x38", (2, 256))
