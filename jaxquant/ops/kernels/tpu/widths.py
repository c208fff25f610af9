"""The number of columns of a block: as many as fit, but for few rows equal, so that reading takes least time."""

from __future__ import annotations

from jaxquant.ops.kernels.tpu.decode import BLOCK

__all__ = ["WIDTHS", "equal_width", "widest"]

WIDTHS = 1024, 512, 256, 128
"""The most columns of a block."""

_CODES = 4096 * 1024  # of a block, if it has more columns


def widest(k: int) -> int:
    """The most columns of a block for few rows: 1024, or more where K is short."""
    return max(WIDTHS[0], _CODES // k)


def equal_width(n: int, most: int) -> int:
    """The columns of equal blocks for few rows. They are two or more, since nothing runs while the first is read.

    Estimates for 8 rows of bfloat16 by int4 on a v5e, in thousand cycles: [4096, 3584] takes 14.5 in blocks of 896
    columns and 16.3 in blocks of 1024, [4096, 1024] 5.7 in two and 7.7 in one, [512, 8192] 5.7 in two and 9.5 in eight;
    reading takes 14.3, 4.1 and 4.1.
    """
    count = max(-(-n // most), 2 if n > 2 * BLOCK else 1)
    return -(-n // (count * BLOCK)) * BLOCK
