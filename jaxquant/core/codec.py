"""Values to codes and back, for one number type, with the scale already applied.

Everything here is elementwise on float32 (float64 where the caller has it) and knows nothing of blocks:

- `round_to_grid`: a scaled value to the nearest value of the grid (a float);
- `codes_of`: a grid value to its code (the integer itself, the fp8 bits, the index of a 4-bit pattern);
- `values_of`: a code to its grid value;
- `to_bits` / `from_bits`: a code to the unsigned bit pattern that is packed, and back;
- `to_int4` / `from_int4`: a code of up to 4 bits to an element of an int4 array, and back;
- `values_of_int4`: an element of an int4 array to its grid value.

Integers round half to even after saturation; floats saturate at their largest finite value (never inf or NaN) and round
half to even and keep the sign of zero; a table rounds to the nearest entry, ties to the lower one (as bitsandbytes
does).
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.arithmetic import exponent, finfo, power_of_two
from jaxquant.core.qtypes import QType
from jaxquant.core.replaceable import Replaceable

__all__ = [
    "chosen",
    "codes_of",
    "decoded",
    "from_bits",
    "from_int4",
    "nearest_codes",
    "round_to_grid",
    "to_bits",
    "to_int4",
    "values_of",
    "values_of_int4",
    "values_of_patterns",
]


def _round(v: jax.Array, noise: jax.Array | None) -> jax.Array:
    """To an integer: half to even, or up with the probability of the fraction where ``noise`` is uniform on [0, 1)."""
    if noise is None:
        return jnp.rint(v)
    low = jnp.floor(v)
    return low + (noise < v - low).astype(v.dtype)  # floor(v + noise) would round: integers could move


def _table_order(qtype: QType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sorted grid, midpoints, code of each sorted entry), distinct values only."""
    grid, first = np.unique(np.asarray(qtype.table, np.float32), return_index=True)
    return grid, (grid[:-1] + grid[1:]) / np.float32(2), first.astype(np.uint8)


def round_to_grid(v: jax.Array, qtype: QType, noise: jax.Array | None = None) -> jax.Array:
    """The grid value for each scaled value ``v``.

    Args:
      v: float array, real values divided by their scale (and shifted by the zero point).
      qtype: the number type; its ``qmin`` and ``qmax`` are where values saturate.
      noise: uniform [0, 1) of v's shape for stochastic rounding, None for nearest-even.

    Returns:
      Array of v's dtype. NaN stays NaN.
    """
    if qtype.kind == "int":
        # NaN passes through clip; infinities saturate.
        q = jnp.clip(_round(jnp.clip(v, qtype.qmin - 1, qtype.qmax + 1), noise), qtype.qmin, qtype.qmax)
        return jnp.where(q == 0, jnp.zeros_like(q), q)  # integers have no -0
    v = jnp.clip(v, qtype.qmin, qtype.qmax)
    if qtype.kind == "float":
        quantum = power_of_two(jnp.maximum(exponent(jnp.abs(v)), qtype.min_exponent) - qtype.mantissa_bits).astype(
            v.dtype
        )
        return jnp.clip(_round(v / quantum, noise) * quantum, qtype.qmin, qtype.qmax)
    grid, middles, _ = _table_order(qtype)
    if noise is None and len(grid) > 16:  # too many to compare with one by one
        out = jnp.asarray(grid, v.dtype).at[_nearest_of(v, qtype)].get(mode="promise_in_bounds")
    elif noise is None:
        out = jnp.full_like(v, grid[0])
        for middle, value in zip(middles.astype(v.dtype), grid[1:], strict=True):
            out = jnp.where(v > middle, jnp.asarray(value, v.dtype), out)
    else:
        out = jnp.full_like(v, grid[0])
        for low, high in itertools.pairwise(grid.tolist()):
            out = jnp.where(noise * (high - low) < v - low, jnp.asarray(high, v.dtype), out)
    return jnp.where(jnp.isnan(v), v, out)


@functools.cache
def _cells(qtype: QType) -> tuple[int, int, np.ndarray]:
    """``(shift, first, below)``: a long table's line of float32 numbers, cut so that no cell has two middles inside.

    A cell is the numbers of one sign whose bits, but for the last ``shift``, are the same: ``first`` in the least cell,
    which has all smaller magnitudes too. ``below`` has for each cell, first the positive ones, the middles below it.
    """
    middles = _table_order(qtype)[1]
    bits = np.abs(middles).view(np.int32)
    top = int(np.float32(max(-qtype.qmin, qtype.qmax)).view(np.int32))
    for shift in range(23, -1, -1):
        first = int(bits[bits > 0].min() >> shift)
        edges = np.arange(first, (top >> shift) + 2) << shift
        edges[0] = 0
        ends = edges.astype(np.int32).view(np.float32)
        # A positive cell is [low, high), a negative one (-high, -low]; a middle on its upper end counts as inside.
        counts = np.searchsorted(middles, ends, side="left"), np.searchsorted(middles, -ends, side="right")
        if all(np.abs(np.diff(count)).max() <= 1 for count in counts):
            return shift, first, np.concatenate([counts[0][:-1], counts[1][1:]]).astype(np.uint8)
    raise AssertionError(qtype.name)


def _nearest_of(v: jax.Array, qtype: QType) -> jax.Array:
    """How many middles of a long table lie below each value: the rank of the nearest entry, the lower one of two."""
    middles = _table_order(qtype)[1]
    if v.dtype != jnp.float32:
        return jnp.searchsorted(jnp.asarray(middles, v.dtype), v, side="left")
    shift, first, below = _cells(qtype)
    bits, each = lax.bitcast_convert_type(v, jnp.int32), below.size // 2
    cell = jnp.clip(((bits & 0x7FFFFFFF) >> shift) - first, 0, each - 1) + jnp.where(bits < 0, each, 0)
    rank = jnp.asarray(below).at[cell].get(mode="promise_in_bounds")
    middle = jnp.asarray(np.append(middles, np.float32(np.inf))).at[rank].get(mode="promise_in_bounds")
    return rank + (v > middle).astype(jnp.uint8)


def _nearest_by_halves(v: jax.Array, qtype: QType) -> jax.Array:
    """`_nearest_of` for a table of 16: four comparisons, each with the middle that the ones before select."""
    middles, rank = _table_order(qtype)[1], jnp.zeros(v.shape, jnp.uint8)
    for step in (8, 4, 2, 1):
        middle = chosen(rank // (2 * step), middles[step - 1 :: 2 * step].astype(v.dtype))
        rank = rank + jnp.where(v > middle, jnp.uint8(step), jnp.uint8(0))
    return rank


def nearest_codes(v: jax.Array, qtype: QType) -> jax.Array:
    """``codes_of(round_to_grid(v))``; of a table in one search; NaN has an arbitrary code."""
    if qtype.kind != "table" or len(_table_order(qtype)[0]) not in (16, 256):
        return codes_of(round_to_grid(v, qtype), qtype)
    code = _table_order(qtype)[2]
    rank = _nearest_of(v, qtype) if code.size > 16 else _nearest_by_halves(v, qtype)
    in_order = np.array_equal(code, np.arange(code.size))
    return (rank if in_order else jnp.asarray(code).at[rank].get(mode="promise_in_bounds")).astype(jnp.uint8)


def codes_of(values: jax.Array, qtype: QType) -> jax.Array:
    """Codes of values that lie on the grid; dtype ``qtype.code_dtype``."""
    if qtype.kind == "int" or (qtype.kind == "float" and not qtype.packed):
        return values.astype(qtype.code_dtype)
    if qtype.kind == "float":  # 4-bit floats: sign bit, then the rank of the magnitude
        magnitudes = values_of(jnp.arange(8, dtype=jnp.uint8), qtype, values.dtype)
        rank = sum((jnp.abs(values) >= magnitudes[k]).astype(jnp.uint8) for k in range(1, 8))
        return rank + jnp.where(jnp.signbit(values), jnp.uint8(8), jnp.uint8(0))
    grid, _, code = _table_order(qtype)
    if len(grid) > 16:
        return jnp.asarray(code).at[_nearest_of(values, qtype)].get(mode="promise_in_bounds")
    out = jnp.full(values.shape, code[0], jnp.uint8)
    for k in range(1, len(grid)):
        out = jnp.where(values >= grid[k].astype(values.dtype), code[k], out)
    return out


def values_of(codes: jax.Array, qtype: QType, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Grid values of codes; of fp8 also of uint8 patterns."""
    if qtype.kind == "int" or (qtype.kind == "float" and codes.dtype != jnp.uint8):
        return codes.astype(dtype)
    if qtype.kind == "table":
        table = np.asarray(qtype.table, np.float32).astype(dtype)
        return chosen(codes, table) if len(table) <= 16 else jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
    if qtype.packed:
        return decoded(codes, qtype, dtype)

    return values_of_patterns(codes, qtype=qtype, dtype=dtype)


@Replaceable
def values_of_patterns(codes: jax.Array, *, qtype: QType, dtype: DTypeLike) -> jax.Array:
    """Values of the uint8 patterns of an 8-bit float."""
    return lax.bitcast_convert_type(codes, qtype.code_dtype).astype(dtype)


def decoded(codes: jax.Array, qtype: QType, dtype: DTypeLike) -> jax.Array:
    """Float patterns: exponent and mantissa as those of a float32, but for magnitudes that are subnormal."""
    bits, sign = codes.astype(jnp.int32), 1 << (qtype.bits - 1)
    magnitude, mantissa = bits & (sign - 1), int(finfo(jnp.float32).nmant)
    shift, bias = mantissa - qtype.mantissa_bits, 127 - 1 + qtype.min_exponent
    normal = lax.bitcast_convert_type((magnitude << shift) + (bias << mantissa), jnp.float32)
    least = 2.0 ** (qtype.min_exponent - qtype.mantissa_bits)
    value = jnp.where(magnitude < 1 << qtype.mantissa_bits, magnitude.astype(jnp.float32) * least, normal)
    if qtype.bits == 8:  # past the largest number: infinity, where there is one, and NaN
        top = int(np.asarray(qtype.qmax, qtype.code_dtype).view(np.uint8))
        infinite = np.isinf(np.asarray(top + 1, np.uint8).view(qtype.code_dtype).astype(np.float32))
        beyond = jnp.where(magnitude == top + 1, jnp.inf, jnp.nan) if infinite else jnp.nan
        value = jnp.where(magnitude > top, beyond, value)
    return jnp.where(bits >= sign, -value, value).astype(dtype)


def chosen(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """The entry of a short table for each code: four nested selects are faster than a gather."""
    found, bit = [jnp.asarray(v) for v in table], 1
    while len(found) > 1:
        found = [jnp.where((codes & bit) != 0, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def to_bits(codes: jax.Array, qtype: QType) -> jax.Array:
    """The unsigned pattern of a packed type's codes: ``code - qmin`` for integers, the index otherwise."""
    if qtype.kind == "int" and qtype.signed:
        return (codes - jnp.int8(qtype.qmin)).astype(jnp.uint8)
    return codes.astype(jnp.uint8)


def from_bits(bits: jax.Array, qtype: QType) -> jax.Array:
    """Inverse of `to_bits`."""
    if qtype.kind == "int" and qtype.signed:
        return bits.astype(jnp.int8) + jnp.int8(qtype.qmin)
    return bits


def to_int4(codes: jax.Array, qtype: QType) -> jax.Array:
    """Codes of up to 4 bits as int4: signed integers as they are, 4-bit floats by their pattern, all others less 8."""
    if qtype.kind == "float":
        codes = (codes ^ jnp.uint8(8)).astype(jnp.int8) - jnp.int8(8)
    elif not (qtype.kind == "int" and qtype.signed):
        codes = codes.astype(jnp.int8) - jnp.int8(8)
    return codes.astype(jnp.int4)


def from_int4(stored: jax.Array, qtype: QType) -> jax.Array:
    """Inverse of `to_int4`."""
    codes = stored.astype(jnp.int8)
    if qtype.kind == "float":
        return codes.astype(jnp.uint8) & jnp.uint8(15)
    return codes if qtype.kind == "int" and qtype.signed else (codes + jnp.int8(8)).astype(jnp.uint8)


def values_of_int4(stored: jax.Array, qtype: QType, dtype: DTypeLike) -> jax.Array:
    """``values_of(from_int4(stored))``, by one conversion if possible, since a GPU's compiler fuses only one."""
    if qtype.kind == "float":
        return lax.bitcast_convert_type(stored, jnp.dtype(qtype.element)).astype(dtype)
    if qtype.kind == "int":
        return stored.astype(dtype) if qtype.signed else stored.astype(dtype) + 8
    return values_of(from_int4(stored, qtype), qtype, dtype)
