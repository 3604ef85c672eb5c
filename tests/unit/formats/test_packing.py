"""The packed layout of transformers, by its literal bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.formats.packing import pack_ternary, packed_shape, unpack_ternary


def test_literal_bytes() -> None:
    codes = torch.tensor([[1, 0], [0, -1], [-1, 1], [1, 1]], dtype=torch.int8)
    # column 0: 2 | 1 << 2 | 0 << 4 | 2 << 6; column 1: 1 | 0 << 2 | 2 << 4 | 2 << 6
    assert pack_ternary(codes).tolist() == [[134, 161]]


def test_a_byte_holds_rows_that_are_a_quarter_apart() -> None:
    codes = torch.zeros(8, 1, dtype=torch.int8)
    codes[[1, 3, 5, 7]] = torch.tensor([[1], [-1], [0], [1]], dtype=torch.int8)
    assert pack_ternary(codes).tolist() == [[0b01_01_01_01], [0b10_01_00_10]]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_and_the_input_stays(quarter: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (4 * quarter, columns), dtype=torch.int8, generator=generator)
    before = codes.clone()
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == packed_shape((4 * quarter, columns)) == (quarter, columns)
    assert torch.equal(unpack_ternary(packed), before)
    assert torch.equal(codes, before)


def test_rows_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4 .* got 6"):
        pack_ternary(torch.zeros(6, 2, dtype=torch.int8))


def test_bytes_that_are_no_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3"):
        unpack_ternary(torch.tensor([[0b01_11_00_10]], dtype=torch.uint8))
