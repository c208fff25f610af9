"""Transposes in the form that XLA's CPU backend compiles well."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.core.layout import transpose, written_transposed

__all__ = ["LARGE", "transpose_by_tiles"]

LARGE = 1 << 18
"""Elements: smaller arrays stay in the cache and are transposed plainly."""

_TILE = 64


@written_transposed.on("cpu", when=lambda x, *, order: _moving(x, order) is not None)
def transpose_by_tiles(x: jax.Array, *, order: Sequence[int]) -> jax.Array:
    """The transpose of an array from memory to memory.

    XLA's CPU backend transposes by tiles. But where it takes a transpose for a change of layout, it copies element by
    element, at an eighth of the speed. Splitting the axis that moves in two prevents this.
    """
    axis = _moving(x, order)
    if axis is None:
        return transpose(x, order)
    tiles = x.reshape(*x.shape[:axis], x.shape[axis] // _TILE, _TILE, *x.shape[axis + 1 :])
    places = [(i,) if i < axis else (i + 1,) if i > axis else (i, i + 1) for i in order]
    return jnp.transpose(tiles, [i for place in places for i in place]).reshape([x.shape[i] for i in order])


def _moving(x: jax.Array, order: Sequence[int]) -> int | None:
    """The first axis that moves, if it can be split into tiles."""
    axis = next((i for i, j in enumerate(order) if i != j), None)
    return None if axis is None or x.shape[axis] % _TILE != 0 else axis
