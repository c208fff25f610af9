"""The maps of moments in a TPU's registers: entries by code and codes by magnitude, without a search.

The entries of a decade are evenly spaced, so that they are on a line with their numbers, which count from 0. The next
decade has twice as many. So the exponent of a number is its decade. The decade of a magnitude is on a line with its
logarithm, for which the bits of a float are near enough. A gather along the 8 rows of a register reads what is constant
in a decade.

The number of a magnitude counts from the first entry of its decade: boundaries are at 0.5, 1.5, and so on. The boundary
below the first entry is nearer to it, at -0.3, since the last entry of the decade before is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.qtypes import QTYPES

__all__ = ["TABLES", "codes", "largest", "tables", "values"]

TABLES = 5
"""Registers of tables of a map."""

_SIGN = np.int32(-(1 << 31))
_DECADES = {
    "dynamic8": (1.0, 3.3819, -0.0231),
    "dynamic4": (1.0, 3.3038, -0.2800),
    "udynamic8": (1.125, 3.3414, 0.1210),
}
"""The number that 1 is scaled to, a factor f and an offset d: a decade of scaled magnitudes begins where
(bits / 2^23 - 127 - d) / f is a whole number. The bits are a logarithm to within 0.09, and f is near log2(10). With
these numbers every decade begins between the last boundary of the one before and its power of ten."""

_PLACES = np.float32(1.5 * 2.0**11)  # added to a place of a decade, it leaves 12 bits of a fraction
_FIRST = np.float32(-0.3)
_LEAST = np.float32(1.5e-7)  # of magnitudes: in the lowest decade, and nearest to 0
_INTEGERS = np.float32(1.5 * 2.0**23)
"""Added to a number of magnitude below 2^22, it rounds to an integer, which the last bits then are."""


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _line(x: np.ndarray, y: np.ndarray, unit: np.ndarray, *, shifted: bool = False) -> tuple[np.float32, np.float32]:
    """The line through points with the least error in float32, in units, of all near the best in reals.

    Returns:
      a and b of ``y = a x + b``, or of ``y = a (x - b)`` if ``shifted``.
    """
    a = (y[-1] - y[0]) / (x[-1] - x[0])
    b = x[0] - y[0] / a if shifted else y[0] - a * x[0]
    near = np.arange(-12, 13)
    factors, offsets = ((np.float32(v).view(np.int32) + near).astype(np.int32).view(np.float32) for v in (a, b))
    factor, offset, x = factors[:, None, None], offsets[:, None], x.astype(np.float32)
    if shifted:
        found = [factor * (x - offset)]
    else:  # in two steps, or in one
        found = [factor * x + offset, (factor.astype(np.float64) * x + offset).astype(np.float32)]
    error = np.max([np.max(np.abs(each - y) / unit, axis=-1) for each in found], axis=0)
    i, j = np.unravel_index(np.nanargmin(error), error.shape)  # NaN beside an offset of 0
    return factors[i], offsets[j]


def _positive(qtype: str) -> np.ndarray:
    """The entries of a map from 0 on."""
    table = np.asarray(QTYPES[qtype].table, np.float32)
    return table[table >= 0].astype(np.float64)


def _zero(qtype: str) -> int:
    """The code of 0."""
    return len(QTYPES[qtype].table or ()) - _positive(qtype).size


def _of_entries(qtype: str) -> np.ndarray:
    """Factors and offsets of entries by the exponents of their places, modulo 8: [2, 8].

    A place is the number plus 1, or 4 times the number if the map has both signs: then no other has the exponent of 0.
    """
    entries = _positive(qtype)
    places = np.arange(entries.size) * 4.0 if _signed(qtype) else np.arange(entries.size) + 1.0
    rows = (places.astype(np.float32).view(np.int32) >> 23) & 7
    lines = np.zeros((2, 8), np.float32)
    for row in np.unique(rows):
        x, y = places[rows == row], entries[rows == row]
        lines[:, row] = _line(x, y, np.maximum(y, 1e-30)) if x.size > 1 else (0, y[0])
    return lines


def _of_decades(qtype: str) -> np.ndarray:
    """Factors and offsets of numbers in a decade, and the numbers of first entries, by decades: [3, 8]."""
    table = np.asarray(QTYPES[qtype].table, np.float32)
    middles = ((table[:-1] + table[1:]) / np.float32(2))[_zero(qtype) :].astype(np.float64) * largest(qtype)
    lines = np.zeros((3, 8), np.float32)
    end, decade = middles.size, 7
    while end > 0:  # from the last entry, which is alone in its decade
        count = 1 if decade == 7 else (end + 2) // 2
        first = end - count
        x = middles[first:end]
        y = np.arange(count) - 0.5
        y[0] = _FIRST
        if count == 1:
            x, y = np.append(x, [*middles, largest(qtype)][end]), np.append(y, 0.4)
        lines[:2, decade] = _line(x, y, x * (y[-1] - y[0]) / (x[-1] - x[0]), shifted=True)
        lines[2, decade] = first + 1
        end, decade = first, decade - 1
    return lines


def _signed(qtype: str) -> bool:
    return QTYPES[qtype].qmin < 0


@functools.cache
def tables(qtype: str) -> np.ndarray:
    """The tables of a map, float32 [TABLES, 8, 128], whose columns are equal; zeros of ``"uint4"``, which is a line.

    Factors and offsets of entries, by the exponents of their places; by decades the factors and offsets of numbers, and
    the codes of first entries.
    """
    found = np.zeros((TABLES, 8, 128), np.float32)
    if QTYPES[qtype].table:
        found[:2] = _of_entries(qtype)[:, :, None]
        found[2:] = _of_decades(qtype)[:, :, None]
        found[4] += _INTEGERS + (_zero(qtype) if _signed(qtype) else 0)
    return found


def largest(qtype: str) -> float:
    """The number that the largest magnitude of a block is scaled to before `codes`."""
    return _DECADES[qtype][0] if QTYPES[qtype].table else QTYPES[qtype].qmax + 1.0


def values(code: jax.Array, table: Sequence[jax.Array], qtype: str, *, interpret: bool) -> jax.Array:
    """Entries of a map to within 4e-7.

    Args:
      code: int32 [8, 128]; of a map of 8 bits less 128.
      table: see `tables`.
      qtype: the map.
      interpret: whether Pallas' interpreter runs it.
    """
    base = 128 if QTYPES[qtype].bits == 8 else 0
    if not _signed(qtype):
        place = code.astype(jnp.float32) + (base + 1.0)
        if not QTYPES[qtype].table:
            return place
        factor, offset = _read(table[:2], _bits(place) >> 23, interpret)
        return place * factor + offset
    place = code.astype(jnp.float32) * 4 + 4.0 * (base - _zero(qtype))
    factor, offset = _read(table[:2], _bits(place) >> 23, interpret)
    return place * factor + lax.bitcast_convert_type(_bits(offset) ^ _bits(place) & _SIGN, jnp.float32)


def codes(x: jax.Array, magnitude: jax.Array, table: Sequence[jax.Array], qtype: str, *, interpret: bool) -> jax.Array:
    """The nearest codes, as the last eight bits of int32; bits above are arbitrary.

    A boundary is computed to two units in its last place: a number that is that near to it may get either code.

    Args:
      x: float32 [8, 128], whose signs are read.
      magnitude: float32, the magnitudes of x times `largest` and divided by the largest of the block.
      table: see `tables`.
      qtype: the map.
      interpret: whether Pallas' interpreter runs it.
    """
    if not QTYPES[qtype].table:
        return _bits(jnp.maximum(magnitude, 1.0) + (_INTEGERS - 1))
    _, factor, offset = _DECADES[qtype]
    log = (_bits(jnp.maximum(magnitude, _LEAST)) >> 8).astype(jnp.float32)  # an integer of 24 bits
    place = log * np.float32(1 / (2.0**15 * factor))
    row = _bits(place + np.float32(_PLACES + 7 - (127 + offset) / factor)) >> 12
    factor, offset, first = _read(table[2:], row, interpret)
    number = (magnitude - offset) * factor
    number = jnp.where(number > _FIRST, number, -1.0) + first
    if _signed(qtype):
        below = jnp.maximum((2 * _INTEGERS + 2 * _zero(qtype)) - number, _INTEGERS)
        number = jnp.where(x < 0, below, number)
    return _bits(number)


def _read(table: Sequence[jax.Array], row: jax.Array, interpret: bool) -> list[jax.Array]:
    """Each table [8, 128] at a row, modulo 8, as the operation counts."""
    row = row & 7 if interpret else row
    return [jnp.take_along_axis(t, row, axis=0, mode="promise_in_bounds") for t in table]
