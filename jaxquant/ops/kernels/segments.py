"""The runs of rows of a ragged product, and the tiles that a kernel works on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Segments", "most_tiles", "spans"]


def most_tiles(rows: int, segments: int, size: int) -> int:
    """The most tiles of ``size`` rows into which segments cut so many rows."""
    return min(rows, (rows + segments * (size - 1)) // size)


def spans(sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The first row of each expert and the end of its rows, int32 [E], from the number of its rows.

    Numbers may add up to more than there are rows: no span goes beyond the last row.
    """
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    return jnp.minimum(ends - sizes.astype(jnp.int32), rows), jnp.minimum(ends, rows)


class Segments(NamedTuple):
    """Runs of rows, each multiplied by one expert. Rows outside of all have no expert.

    Segments lie within the rows and do not overlap: `most_tiles` relies on it.

    Attributes:
      start, end: the rows of each, int32 [S].
      expert: its expert, int32 [S].
      place: layer * E + expert, the index of the expert in a stack that is flattened to [layers * E, ...]; int32 [S].
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
        number = lax.iota(jnp.int32, most_tiles(rows, self.start.shape[0], size))
        tile = self.tile(number, size)
        return jnp.stack([tile.expert, tile.place, tile.start, tile.end], axis=1).astype(jnp.int32)

    def tile(self, number: jax.Array, size: int) -> Segments:
        """Tiles by their number [...]: each starts at its own first row, and ends with its segment."""
        count, upto = self.start.shape[0], jnp.cumsum(self._count(size))
        segment = jnp.sum(upto.reshape((1,) * number.ndim + (count,)) <= number[..., None], axis=-1)
        own = jnp.minimum(segment, count - 1)
        before = jnp.where(own > 0, upto[own - 1], 0)
        first = jnp.where(segment < count, self.start[own] + (number - before) * size, self.end[own])
        return Segments(first, self.end[own], self.expert[own], self.place[own])

    def number_of_tiles(self, size: int) -> jax.Array:
        """How many tiles have rows."""
        return jnp.sum(self._count(size), dtype=jnp.int32)

    def _count(self, size: int) -> jax.Array:
        return -(-(self.end - self.start) // size)

    def cover(self, row: jax.Array) -> jax.Array:
        """Whether rows [M] have an expert: bool [M]."""
        row = row[:, None]
        return jnp.any((self.start[None] <= row) & (row < self.end[None]), axis=1)
