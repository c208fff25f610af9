"""Comparison of axis sizes, which may be symbols in a program exported for every batch size."""

from __future__ import annotations

import math

from jax.export import is_symbolic_dim

__all__ = ["number"]


def number(size: int) -> float:
    """A size to compare with others: itself, or infinity if it is a symbol and so not known.

    Source: `jax.export.symbolic_shape`.
    """
    return math.inf if is_symbolic_dim(size) else size
