"""Codes of a moment in a TPU's registers, as entries and back, for `COLUMNS` columns of a parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.qtypes import QTYPES
from jaxquant.optim import dynamic_maps

__all__ = ["COLUMNS", "LANES", "ROWS", "TINY", "Form", "reciprocal"]

LANES = 128
"""Columns of a register."""

COLUMNS = 2 * LANES
"""Columns that are computed together, in two halves."""

ROWS = 2 * LANES
"""The fewest rows that are computed together."""

TINY = float(np.finfo(np.float32).tiny)
_EACH_128 = np.int32(np.uint32(0x80808080).astype(np.int32))
_LOW = np.int32(0x0F0F0F0F)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x to a few units in the last place; NaN of infinity and zero."""
    from jax.experimental import pallas as pl

    accurate = {"full_range": False} if "full_range" in inspect.signature(pl.reciprocal).parameters else {}
    return pl.reciprocal(x, **accurate)


def _at_lanes(x: jax.Array, lane: jax.Array) -> jax.Array:
    """Each row of a register at its lanes."""
    return jnp.take_along_axis(x, lane, axis=1, mode="promise_in_bounds")


def _diagonal(first: int) -> jax.Array:
    """Where row i of a register has lane ``first + i``."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (8, LANES), axis) for axis in (0, 1))
    return lane == row + first


class Form(NamedTuple):
    """How a moment is stored.

    Attributes:
      qtype: its map.
      block: numbers that share a scale, 128 or 256.
      table: the place of the tables of its map.
      interpret: whether Pallas' interpreter runs the kernel.
    """

    qtype: str
    block: int
    table: int
    interpret: bool

    @property
    def in_byte(self) -> int:
        """Codes in a byte."""
        return 8 // QTYPES[self.qtype].bits

    def columns(self, j: jax.Array) -> Any:
        """The bytes of the j-th columns."""
        from jax.experimental import pallas as pl

        count = COLUMNS // self.in_byte
        return pl.ds(pl.multiple_of(j * count, count), count)

    def entries(self, codes: jax.Array, table: Sequence[jax.Array]) -> list[jax.Array]:
        """The entries of codes, for either half of the columns."""
        of = functools.partial(dynamic_maps.values, table=table, qtype=self.qtype, interpret=self.interpret)
        return [self._by_registers(of, half) for half in self._integers(codes)]

    def codes(
        self, x: list[jax.Array], least: jax.Array, table: Sequence[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The nearest codes of both halves of the columns, and the largest magnitudes of each block, [1, rows].

        Args:
          x: either half of the columns.
          least: largest magnitudes below this are 0.
          table: see `dynamic_maps.tables`.
        """
        of = functools.partial(dynamic_maps.codes, table=table, qtype=self.qtype, interpret=self.interpret)
        magnitudes = [jnp.abs(half) for half in x] if QTYPES[self.qtype].qmin < 0 else x
        blocks = magnitudes if self.block == LANES else [jnp.maximum(*magnitudes)]
        # infinity of NaN, which the maximum of two keeps
        most = [jnp.max(jnp.where(b != b, jnp.inf, b), axis=1, keepdims=True) for b in blocks]
        units = [jnp.where(m >= least, reciprocal(m) * dynamic_maps.largest(self.qtype), 0) for m in most]
        units = units * (2 // len(units))
        found = [self._by_registers(of, a, b * unit) for a, b, unit in zip(x, magnitudes, units, strict=True)]
        return self._stored(found), [self.gathered(m) for m in most]

    def spread(self, scales: jax.Array) -> jax.Array:
        """Scales [1, rows] in all lanes: [rows, 128].

        A sum over the lanes of a diagonal: it waits for less than a transpose.
        """
        if self.interpret:  # one equation for all registers
            return jnp.broadcast_to(scales.reshape(-1, 1), (scales.size, LANES))
        found = []
        for i in range(0, scales.size, 8):
            part = jnp.broadcast_to(scales[:, i // LANES * LANES :][:, :LANES], (8, LANES))
            own = jnp.sum(jnp.where(_diagonal(i % LANES), part, 0.0), axis=1, keepdims=True)
            found.append(jnp.broadcast_to(own, (8, LANES)))
        return jnp.concatenate(found, axis=0)

    def gathered(self, absmax: jax.Array) -> jax.Array:
        """Largest magnitudes [rows, 1] as [1, rows]."""
        if self.interpret:
            return absmax.reshape(1, -1)
        found = []
        for first in range(0, absmax.size, LANES):
            diagonal = jnp.zeros((8, LANES), jnp.float32)
            for i in range(0, LANES, 8):
                diagonal = jnp.where(_diagonal(i), absmax[first + i : first + i + 8], diagonal)
            found.append(jnp.max(diagonal, axis=0, keepdims=True))
        return jnp.concatenate(found, axis=1)

    def scale(self, absmax: jax.Array, unit: jax.Array, least: jax.Array) -> jax.Array:
        """Scales of blocks by their largest magnitudes in units, as `moments.stored` has them."""
        table = bool(QTYPES[self.qtype].table)
        steps = 1.0 if table else QTYPES[self.qtype].qmax + 1.0
        scale = jnp.where(absmax >= least, absmax * (unit / steps), float(table))
        return jnp.where(absmax < jnp.inf, jnp.maximum(scale, TINY), jnp.nan)

    def _integers(self, codes: jax.Array) -> list[jax.Array]:
        """Codes in int32, those of 8 bits less 128, for either half of the columns."""
        from jax.experimental.pallas import tpu as pltpu

        words = pltpu.bitcast(codes, jnp.int32)
        if self.in_byte == 1:
            found = pltpu.bitcast(words ^ _EACH_128, jnp.int8).astype(jnp.int32)
            return [found[:, :LANES], found[:, LANES:]]

        def spread(word: jax.Array, half: int) -> jax.Array:
            lane = lax.broadcasted_iota(jnp.int32, word.shape, 1)
            word = _at_lanes(word, (lane >> 1) + LANES // 2 * half)
            return jnp.where(lane & 1 == 1, word >> 4, word) & _LOW

        halves = [self._by_registers(functools.partial(spread, half=half), words) for half in range(2)]
        return [pltpu.bitcast(half, jnp.int8).astype(jnp.int32) for half in halves]

    def _stored(self, halves: list[jax.Array]) -> jax.Array:
        """The bytes of codes, given in the last bits of int32 for either half of the columns."""
        from jax.experimental.pallas import tpu as pltpu

        if self.in_byte == 1:
            return pltpu.bitcast(jnp.concatenate(halves, axis=1).astype(jnp.int8), jnp.uint8)

        def pairs(first: jax.Array, second: jax.Array) -> jax.Array:
            lane = lax.broadcasted_iota(jnp.int32, first.shape, 1)

            def of(place: jax.Array) -> jax.Array:
                found = [_at_lanes(word, place & LANES - 1) for word in (first, second)]
                return jnp.where(lane < LANES // 2, *found)

            return of(2 * lane) | of(2 * lane + 1) << 4

        words = [pltpu.bitcast(half.astype(jnp.int8), jnp.int32) for half in halves]
        return pltpu.bitcast(self._by_registers(pairs, *words), jnp.uint8)

    def _by_registers(self, fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """A function of registers, [8, 128], for every eight rows."""
        rows = arrays[0].shape[0]
        if self.interpret:
            return jax.vmap(fn)(*(x.reshape(rows // 8, 8, LANES) for x in arrays)).reshape(arrays[0].shape)
        return jnp.concatenate([fn(*(x[i : i + 8] for x in arrays)) for i in range(0, rows, 8)], axis=0)
