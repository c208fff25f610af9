"""The dynamic maps of 8 bits in a TPU's registers: entries by code and codes by magnitude, without a search.

The entries of a decade are evenly spaced, and the next decade has twice as many. So a decade of magnitudes is on a line
with the numbers of its entries, for the signed map

    number = 2^i (8/9 + magnitude 10^(6 - i) / 0.9)        i = 0 .. 6

and the boundary below entry j of a decade is 10^(i - 6) (0.1 + 0.9 max(j, 0.2) / 2^i). The exponent of an entry's
number is its decade. So is that of magnitude^log10(2); a little is added, so that a magnitude belongs to the decade of
its nearest boundary, whatever the last bits of the power are. A gather along the 8 rows of a register reads the factors
of a decade.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.qtypes import QTYPES

__all__ = ["TABLES", "codes", "tables", "values"]

TABLES = 7
"""Registers of tables of a map."""

_DECADES = 7
_SIGN = np.int32(-(1 << 31))
_LEAST = 10.0**-6.5  # the middle, by logarithms, of the least decade
_LATE = 0.8 / 256  # 0.45 to 0.9 of a step of magnitudes, at the end of each decade of the signed map


def _round(qtype: str) -> float:
    """Added to the number of a boundary in float32, it rounds; then the last bits are the code above, less 128."""
    return 2.0**23 + (-1 if qtype == "dynamic8" else 128)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.float32, np.float32]:
    """Factor and offset of ``y = factor x - offset`` with the least error in float32, of all near the best in reals."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0]) if x.size > 1 else y[0] / x[0]
    near = np.arange(-8, 9)

    def beside(v: float) -> np.ndarray:
        return (np.float32(v).view(np.int32) + near).astype(np.int32).view(np.float32)

    factors, offsets = beside(slope)[:, None, None], beside(slope * x[0] - y[0])[:, None]
    apart = x.astype(np.float32) * factors - offsets
    fused = (x.astype(np.float32).astype(np.float64) * factors - offsets).astype(np.float32)
    error = np.max([np.max(np.abs(found - y) / np.maximum(y, 1e-30), axis=-1) for found in (apart, fused)], axis=0)
    i, j = np.unravel_index(np.nanargmin(error), error.shape)
    return factors[i, 0, 0], offsets[j, 0]


@functools.cache
def tables(qtype: str) -> np.ndarray:
    """The tables of a map, float32 [TABLES, 8, 128], whose columns are equal.

    Factors and offsets of entries, by the exponents of their numbers; by decades the factors and offsets of numbers,
    the numbers where decades begin, and factors and offsets of boundaries.
    """
    table = np.asarray(QTYPES[qtype].table, np.float32)
    lowest = 0 if qtype == "dynamic8" else 1
    entries = table[table >= 0].astype(np.float64)
    middles = ((table[:-1] + table[1:]) / np.float32(2))[table.size - entries.size :].astype(np.float64)
    lines = np.zeros((TABLES, 8))
    for i in range(_DECADES):
        steps = 2 ** (i + lowest)
        numbers = np.arange(steps, 2 * steps)
        first = steps - lowest
        lines[:2, (127 + i + lowest) % 8] = _line(numbers + 0.5, entries[numbers - lowest])
        inner = np.maximum(np.arange(steps), 0.2)
        lines[2:, i] = (
            steps * 10.0 ** (_DECADES - 1 - i) / 0.9,
            steps * 8 / 9 - lowest,
            first + _round(qtype),
            *_line(inner, middles[first - 1 : first - 1 + steps]),
        )
    ends = np.array([0.5, 128.5]) + lowest * np.array([1, 128])  # the exponents of 0 and 1, which are 8 apart
    lines[:2, (127 + lowest + _DECADES) % 8] = _line(ends, entries[[0, -1]])
    lines[2:, _DECADES] = 0, middles.size, middles.size + _round(qtype), 0, -middles[-1]
    return np.broadcast_to(lines.astype(np.float32)[..., None], (TABLES, 8, 128))


def values(code: jax.Array, table: jax.Array, qtype: str, *, interpret: bool) -> jax.Array:
    """Entries of a map to within 4e-7, by int32 codes less 128; see `codes`."""
    if qtype != "dynamic8":
        return _on_line(code.astype(jnp.float32) + 129.5, table, interpret)
    place = code.astype(jnp.float32) + 1.0
    entry = _on_line(jnp.abs(place) + 0.5, table, interpret)
    return lax.bitcast_convert_type(_bits(entry) | _bits(place) & _SIGN, jnp.float32)


def _on_line(number: jax.Array, table: jax.Array, interpret: bool) -> jax.Array:
    exponent = _bits(number) >> 23
    return number * _of_rows(table[0], exponent, interpret) - _of_rows(table[1], exponent, interpret)


def codes(unit: jax.Array, table: jax.Array, qtype: str, *, interpret: bool) -> jax.Array:
    """The nearest codes, the lower of two, less 128; bits above the last eight are arbitrary.

    A boundary is computed to two units in its last place: a number that is that near to it may get either code.

    Args:
      unit: float32; at most 1, and at least -1 or 0.
      table: see `tables`.
      qtype: the map.
      interpret: whether Pallas' interpreter runs it.
    """
    signed = qtype == "dynamic8"
    unit = jnp.maximum(unit, -_last_of(qtype)) if signed else unit
    magnitude = jnp.abs(unit) if signed else unit
    log = jnp.log(jnp.maximum(magnitude, _LEAST)) * np.float32(1 / math.log(10))
    decade = _bits(jnp.exp2(log) + (_LATE if signed else _LATE / 2)) >> 23
    read = functools.partial(_of_rows, index=decade, interpret=interpret)
    number = magnitude * read(table[2]) + read(table[3]) + _round(qtype)
    middle = jnp.maximum(number - read(table[4]), 0.2) * read(table[5]) - read(table[6])
    if not signed:
        number = _bits(number) & 255
        return jnp.where(unit > middle, number, number - 1)
    number = _bits(number) & 127
    sign = _bits(unit) & _SIGN
    middle = lax.bitcast_convert_type(_bits(middle) | sign, jnp.float32)
    number = number ^ sign >> 31
    return jnp.where(unit > middle, number, number - 1)


@functools.cache
def _last_of(qtype: str) -> np.float32:
    """The largest magnitude of the last entry but one."""
    entries = np.asarray(QTYPES[qtype].table[-2:], np.float32)
    return np.nextafter((entries[0] + entries[1]) / np.float32(2), np.float32(0))


def _of_rows(table: jax.Array, index: jax.Array, interpret: bool) -> jax.Array:
    """Row ``index`` modulo 8 of each column of [8, 128]."""
    index = index & 7 if interpret else index  # the operation counts modulo the length of the table
    return jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds")


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
