"""Transposes as XLA's CPU backend compiles them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.core.layout import transpose, written_transposed

__all__ = ["LARGE", "transpose_by_tiles"]

LARGE = 1 << 18
"""Elements; what is smaller stays in the cache, and is not worth a program of its own."""

_TILE = 64


@written_transposed.on("cpu", when=lambda x, *, order: _moving(x, order) is not None)
def transpose_by_tiles(x: jax.Array, *, order: Sequence[int]) -> jax.Array:
    """The transpose of an array in memory that is to be written to memory.

    XLA's CPU backend has a transpose that goes by tiles, and an eighth of its speed where it takes the transpose for a
    change of layout and then copies element by element. It does not where the axis that moves is cut in two.
    """
    axis = _moving(x, order)
    if axis is None:
        return transpose(x, order)
    tiles = x.reshape(*x.shape[:axis], x.shape[axis] // _TILE, _TILE, *x.shape[axis + 1 :])
    places = [(i,) if i < axis else (i + 1,) if i > axis else (i, i + 1) for i in order]
    return jnp.transpose(tiles, [i for place in places for i in place]).reshape([x.shape[i] for i in order])


def _moving(x: jax.Array, order: Sequence[int]) -> int | None:
    """The first axis that moves, if it can be cut in tiles."""
    axis = next((i for i, j in enumerate(order) if i != j), None)
    return None if axis is None or x.shape[axis] % _TILE != 0 else axis
