"""Decodes stored codes to numbers for the matrix unit; 4-bit codes that are not integers are decoded eight at a time.

An int4 array lies in tiles of 64 rows: a 32-bit word of a vector register has eight consecutive rows of one column.
Boolean operations on such words work on 8,192 codes at once. They change the order of rows: a word that is split into
bytes has every second row, into halves every fourth. The activation is permuted into the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.qtypes import QType

__all__ = ["BLOCK", "Decoder", "decoder", "scale_of"]

BLOCK = 128
"""Rows of codes that are decoded and multiplied at a time: the length of a matrix unit's sum."""

_SPARSE = {"nf4": (-0.03625, 1.75), "fp4": (0.0, 1.5)}
"""The zero and the unit of a table's entries. Among the choices for which bfloat16 is as close to the entries as
without them, this one's patterns take the fewest operations (88 for nf4, down from 116)."""

_FNUZ = "float8_e4m3b11fnuz"
"""The 8-bit float that TPUs convert in one instruction. Its numbers have the patterns of float8_e4m3fn's, which are 16
times as large, but for -0 and NaN."""

_SUBNORMAL = 2.0**14  # float8_e5m2 has its exponents this much lower than a 4-bit float, of the same other bits


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes a block of codes to numbers: value = (number + shift) * factor.

    Attributes:
      kind: integers, unchanged; 4-bit floats, by way of an 8-bit float; entries of a table of 16; 8-bit floats.
      shift: added to a number.
      factor: multiplied by the sum.
      patterns: of bfloat16, of a table's entries by code.
      element: the dtype of 8-bit floats.
    """

    kind: Literal["integers", "floats4", "table", "floats8"]
    shift: float = 0
    factor: float = 1
    patterns: tuple[int, ...] = ()
    element: str = ""

    @property
    def parts(self) -> int:
        """The number of runs of rows that a block is sorted into: row ``parts * i + j`` is the i-th of the j-th run."""
        return {"integers": 1, "floats4": 2, "table": 4, "floats8": 1}[self.kind]

    def source(self, row: jax.Array) -> jax.Array:
        """The row of a block that decoding moves to each place."""
        if self.parts == 1:
            return row
        if self.kind == "table":  # a register of halves has two of the eight rows of a word, four apart
            return (row & 30) << 2 | row >> 5 | (row & 1) << 2
        return (row & 63) << 1 | row >> 6

    def numbers(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """[128, columns] of codes as numbers, in bfloat16, or integers in int8."""
        from jax.experimental.pallas import tpu as pltpu

        if self.kind == "integers":
            return codes.astype(dtype)
        words = pltpu.bitcast(codes, jnp.int32)
        if self.kind == "floats8":
            words = _in_fnuz(words) if self.element == _FNUZ else words
            return pltpu.bitcast(words, jnp.dtype(self.element)).astype(dtype)
        if self.kind == "table":
            return pltpu.bitcast(jnp.concatenate(_halves(words, self.patterns), axis=0), jnp.bfloat16).astype(dtype)
        # Sign, exponent and fraction in the places that they have in an 8-bit float.
        even = (words & _word(0x08080808)) << 4 | (words & _word(0x07070707)) << 1
        odd = words & _word(0x80808080) | _right(words, 3) & _word(0x0E0E0E0E)
        return pltpu.bitcast(jnp.concatenate([even, odd], axis=0), jnp.float8_e5m2).astype(dtype)


def decoder(qtype: QType) -> Decoder:
    """The decoder for codes of a type in the form that `QTensor.laid_out` stores."""
    if qtype.kind == "int":
        return Decoder("integers", shift=0 if qtype.signed or not qtype.packed else 8)
    if qtype.kind == "float" and qtype.packed:
        return Decoder("floats4", factor=_SUBNORMAL)
    if qtype.element == "float8_e4m3fn":
        return Decoder("floats8", factor=16, element=_FNUZ)
    if qtype.kind == "float":
        return Decoder("floats8", element=str(qtype.element))
    zero, unit = _SPARSE.get(qtype.name, (0.0, 1.0))
    bits = ((np.asarray(qtype.table, np.float32) - zero) * unit).astype(jnp.bfloat16).view(np.uint16).tolist()
    patterns = (*bits[8:], *bits[:8])  # indexed by the four stored bits, code - 8
    return Decoder("table", shift=zero * unit, factor=1 / unit, patterns=patterns)


def _in_fnuz(words: jax.Array) -> jax.Array:
    """Four patterns of float8_e4m3fn in each word as those of float8_e4m3b11fnuz: -0 is 0, and NaN is 0x80.

    A register has 4,096 codes, for which this takes ten operations. A conversion of float8_e4m3fn takes six for each
    1,024.
    """
    magnitude, low = words & _word(0x7F7F7F7F), _word(0x7F7F7F7F)
    unsigned = words & (magnitude + low | low)  # adding 127 sets the high bit of a byte that is not 0
    nan = (magnitude + _word(0x01010101)) & _word(0x80808080)
    return (unsigned | nan) ^ (nan - _right(nan, 7))


def _word(bits: int) -> jax.Array:
    return jnp.int32(np.uint32(bits).astype(np.int32))


def _right(x: jax.Array, count: int) -> jax.Array:
    return lax.shift_right_logical(x, jnp.int32(count)) if count else x


def _halves(words: jax.Array, patterns: Sequence[int]) -> list[jax.Array]:
    """The 16-bit patterns of eight codes per word, two per word: word i has rows i and i + 4 of the eight."""
    rows = [_joined(planes) for planes in _grouped(_planes(words, patterns), 4)]
    for distance in (2, 1):  # four by four nibbles of each half change places with their words
        mask = _word(0x00FF00FF if distance == 2 else 0x0F0F0F0F)
        for i in range(4):
            if not i & distance:
                low, high = rows[i], rows[i + distance]
                moved = (_right(low, 4 * distance) ^ high) & mask
                rows[i], rows[i + distance] = low ^ moved << 4 * distance, high ^ moved
    return rows


def _grouped(planes: list[Any], size: int) -> list[list[Any]]:
    return [planes[i : i + size] for i in range(0, len(planes), size)]


def _joined(planes: list[jax.Array | bool]) -> jax.Array:
    """Four planes, each in the lowest bit of every nibble, or a constant, as one word of nibbles."""
    same = sum(1 << i for i, plane in enumerate(planes) if plane is True)
    total: Any = None
    for i, plane in enumerate(planes):
        if not isinstance(plane, bool):
            moved = plane << i if i else plane
            total = moved if total is None else total | moved
    constant = _word(0x11111111 * same)
    return constant if total is None else total | constant if same else total


def _planes(words: jax.Array, patterns: Sequence[int]) -> list[Any]:
    """Each bit of the patterns, in the lowest bit of each nibble; True or False if it is the same in all patterns.


    A bit is a sum modulo 2 of products of the four bits of the code (its algebraic normal form). Sums of
    two that several bits share are computed once (Paar's greedy search).
    """
    lowest = _word(0x11111111)
    values: dict[int, jax.Array] = {0: jnp.full_like(words, lowest)}
    sums = [_normal_form([pattern >> bit & 1 for pattern in patterns]) for bit in range(16)]
    for product in range(1, 16):
        first, rest = product & -product, product & (product - 1)
        values[product] = values[rest] & values[first] if rest else _right(words, first.bit_length() - 1) & lowest
    while True:
        pairs: dict[tuple[int, int], int] = {}
        for s in {frozenset(s) for s in sums}:
            ordered = sorted(s)
            for k, a in enumerate(ordered):
                for b in ordered[k + 1 :]:
                    pairs[a, b] = pairs.get((a, b), 0) + 1
        if not pairs:
            break
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], (-item[0][0], -item[0][1])))
        new = len(values)
        values[new] = values[a] ^ values[b]
        sums = [(s - {a, b}) | {new} if a in s and b in s else s for s in sums]
    return [values[next(iter(s))] if s - {0} else bool(s) for s in sums]


def _normal_form(truth: list[int]) -> frozenset[int]:
    """The products whose sum modulo 2 is a function of four bits, given by its 16 values."""
    form = list(truth)
    for bit in (1, 2, 4, 8):
        form = [v ^ form[i ^ bit] if i & bit else v for i, v in enumerate(form)]
    return frozenset(i for i, v in enumerate(form) if v)


def scale_of(stored: jax.Array, form: str) -> jax.Array:
    """Scales in float32, from numbers or from 8-bit floats or their patterns."""
    from jax.experimental.pallas import tpu as pltpu

    if form not in ("float8_e8m0fnu", "float8_e4m3fn"):
        return stored.astype(jnp.float32)
    bits = pltpu.bitcast(stored, jnp.uint8).astype(jnp.int32)
    if form == "float8_e8m0fnu":
        return jnp.where(bits == 255, jnp.nan, lax.bitcast_convert_type(bits << 23, jnp.float32))
    exponent, fraction = bits >> 3 & 15, bits & 7  # float8_e4m3fn
    normal = lax.bitcast_convert_type(exponent + 120 << 23 | fraction << 20, jnp.float32)
    value = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(bits & 127 == 127, jnp.nan, value)
    return jnp.where(bits >= 128, -value, value)
