"""The runs of rows of a ragged product, and the tiles that a kernel works on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Segments", "most_tiles"]


def most_tiles(rows: int, segments: int, size: int) -> int:
    """The most tiles of ``size`` rows into which segments cut so many rows."""
    return min(rows, (rows + segments * (size - 1)) // size)


class Segments(NamedTuple):
    """Runs of rows, each multiplied by one expert. They do not overlap; rows outside of all have no expert.

    Attributes:
      start, end: the rows of each, int32 [S].
      expert: its expert in the arrays of one layer, int32 [S].
      place: its expert in the arrays of a stack, all of whose experts are counted: int32 [S].
    """

    start: jax.Array
    end: jax.Array
    expert: jax.Array
    place: jax.Array

    def tiles(self, rows: int, size: int) -> jax.Array:
        """The tiles of all segments, of up to ``size`` rows each.

        Args:
          rows: all rows.
          size: of a tile.

        Returns:
          int32 [T, 4], with T as `most_tiles` has it: for each tile its expert, its place, its first row and the end of
          its segment. Tiles that are not needed have no rows.
        """
        count = self.start.shape[0]
        upto = jnp.cumsum(-(-(self.end - self.start) // size))
        tile = lax.iota(jnp.int32, most_tiles(rows, count, size))
        segment = jnp.sum(upto[None, :] <= tile[:, None], axis=1)
        own = jnp.minimum(segment, count - 1)
        before = jnp.where(own > 0, upto[own - 1], 0)
        first = jnp.where(segment < count, self.start[own] + (tile - before) * size, self.end[own])
        return jnp.stack([self.expert[own], self.place[own], first, self.end[own]], axis=1).astype(jnp.int32)

    def cover(self, row: jax.Array) -> jax.Array:
        """Whether rows [M] have an expert: bool [M]."""
        row = row[:, None]
        return jnp.any((self.start[None] <= row) & (row < self.end[None]), axis=1)
