"""Decoded codes in dots for each group, as a TPU has them fast."""

from __future__ import annotations

from jaxquant.ops.kernels import decoded
from jaxquant.ops.problem import Product

__all__ = ["BatchedDecoded"]

_ROWS, _GROUP = 16, 128  # up to so many rows, from such groups on


class BatchedDecoded(decoded.BatchedDecoded):
    """The same, for whatever is exact."""

    platforms = ("tpu",)

    @classmethod
    def is_faster(cls, problem: Product, group: int) -> bool:
        """As for `decoded.BatchedDecoded`, by the compiler's estimate."""
        return problem.rows <= _ROWS and group >= _GROUP
