"""A scale is stored where its type holds it, and refused where it would be another."""

import pytest
import torch

from bitnet_train.formats.scale import all_zero, rounded_scale


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (0.0123, torch.float16),
        (1e-5, torch.float16),
        (65504.0, torch.float16),
        (1e-30, torch.bfloat16),
        (1e-40, torch.float32),
    ],
)
def test_what_a_type_holds_is_rounded_to_it(scale: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(scale)
    assert torch.equal(rounded_scale(exact, dtype), exact.to(dtype))


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, torch.float16) for scale in (1e-9, 1e-7, 1e6, 0.0, -1.0, float("nan"), float("inf"))),
        *((scale, torch.bfloat16) for scale in (0.0, float("inf"))),
        (0.0, torch.float32),
    ],
)
def test_what_it_does_not_hold_is_refused(scale: float, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"the scale must be a number that {str(dtype)[6:]} holds to 8 bits, got "):
        rounded_scale(torch.tensor(scale), dtype)


def test_zeros_are_told_from_one_code_at_the_end() -> None:
    codes = torch.zeros(64, 64, dtype=torch.int8)
    assert all_zero(codes)
    codes[-1, -1] = -1
    assert not all_zero(codes)
