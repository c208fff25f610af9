"""Arrays in memory: what is large, and transposes as XLA compiles them.

A size may be a symbol, where a program is exported for every batch (`jax.export.symbolic_shape`). It counts as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

__all__ = ["LARGE", "number", "transpose", "transpose_by_tiles"]

LARGE = 1 << 18
"""Elements; what is smaller stays in the cache, and is not worth a program of its own."""

_TILE = 64


def number(size: Any) -> float:
    """A size to compare with others: itself, or infinity if it is a symbol and so not known."""
    return math.inf if is_symbolic_dim(size) else size


def transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """`jnp.transpose`, and nothing at all where nothing moves."""
    return x if tuple(order) == tuple(range(x.ndim)) else jnp.transpose(x, order)


def transpose_by_tiles(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """The transpose of an array in memory that is to be written to memory.

    XLA's CPU backend has a transpose that goes by tiles, and an eighth of its speed where it takes the transpose for a
    change of layout and then copies element by element. It does not where the axis that moves is cut in two.
    """
    axis = next((i for i, j in enumerate(order) if i != j), None)
    if axis is None or x.shape[axis] % _TILE != 0:
        return transpose(x, order)
    tiles = x.reshape(*x.shape[:axis], x.shape[axis] // _TILE, _TILE, *x.shape[axis + 1 :])
    places = [(i,) if i < axis else (i + 1,) if i > axis else (i, i + 1) for i in order]
    return jnp.transpose(tiles, [i for place in places for i in place]).reshape([x.shape[i] for i in order])
