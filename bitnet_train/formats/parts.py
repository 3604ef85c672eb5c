"""A large tensor by blocks of rows: read, cast, written and compared without being whole in memory."""

from math import prod

_VALUES = 1 << 22


def rows_per_part(shape: tuple[int, ...]) -> int:
    """How many rows make a block of about four million values; the same for every dtype."""
    return max(1, _VALUES // max(1, prod(shape[1:])))
