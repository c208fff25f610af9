"""Decodes stored codes to numbers for the matrix unit; 4-bit codes that are not integers are decoded eight at a time.

An int4 array lies in tiles of 64 rows: a 32-bit word of a vector register has eight consecutive rows of one column.
Boolean operations on such words work on 8,192 codes at once. They change the order of rows: a word that is split into
bytes has every second row, into nibbles every eighth. The activation is permuted into the same order.

A table is read by an operation that gathers 32-bit words along the eight rows of a register: three bits of a code
choose a word, which has two entries, and the fourth bit one of these. Eight codes of a word take 44 operations of the
vector unit, and 52 on a v6e. (Algebraic normal forms of all bits of the entries take 88.)

From the v6e on an operation gathers bytes among the 32 rows of a register. Two tables have the upper and the lower
bytes of the entries in bfloat16. Eight codes of a word take 13 operations. So 4-bit floats, which take 21 otherwise,
are read from a table too. Bytes are compared there, and bfloat16 is multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.qtypes import QType

__all__ = ["BLOCK", "RUN", "Decoder", "decoder", "scale_of", "table_words"]

BLOCK = 128
"""Rows of codes that are decoded and multiplied at a time: the length of a matrix unit's sum."""

RUN = 64
"""Rows of 4-bit codes in a register, which are read from one table."""

_FNUZ = "float8_e4m3b11fnuz"
"""The 8-bit float that TPUs convert in one instruction. Its numbers have the patterns of float8_e4m3fn's, which are 16
times as large, but for -0 and NaN."""

_SUBNORMAL = 2.0**14  # float8_e5m2 has its exponents this much lower than a 4-bit float, of the same other bits


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes a block of codes to numbers: value = (number + shift) * factor.

    Attributes:
      kind: integers, unchanged, or 128 less if they are bytes without a sign; 4-bit floats, by way of an 8-bit float;
        entries of a table of 16; 8-bit floats.
      shift: added to a number.
      factor: multiplied by the sum.
      table: its entries.
      element: the dtype of 8-bit floats.
      bytewise: whether a table is read by gathers of bytes, and 8-bit floats are compared as bytes.
    """

    kind: Literal["integers", "floats4", "table", "floats8"]
    shift: float = 0
    factor: float = 1
    table: tuple[float, ...] = ()
    element: str = ""
    bytewise: bool = False

    @property
    def parts(self) -> int:
        """The number of runs of rows that a block is sorted into: row ``parts * i + j`` is the i-th of the j-th run."""
        return {"integers": 1, "floats4": 2, "table": 4 if self.bytewise else 8, "floats8": 1}[self.kind]

    def in_bytes(self) -> Decoder:
        """The decoder of the same floats, or of the same table, by operations on bytes."""
        if self.kind in ("table", "floats8"):
            return dataclasses.replace(self, bytewise=True)
        patterns = np.arange(16, dtype=np.uint8) ^ 8
        values = patterns.view(jnp.float4_e2m1fn).astype(np.float32)
        return Decoder("table", table=tuple(values.tolist()), bytewise=True)

    @property
    def is_exact(self) -> bool:
        """Whether numbers are exact in bfloat16."""
        entries = _entries(self.table)  # zeros where there is no table
        return bool((entries.astype(jnp.bfloat16).astype(np.float32) == entries).all())

    def source(self, row: jax.Array) -> jax.Array:
        """The row of a block that decoding moves to each place."""
        run = BLOCK // self.parts
        return (row & (run - 1)) * self.parts | row >> run.bit_length() - 1

    def numbers(self, codes: jax.Array, dtype: DTypeLike, *, interpret: bool = False) -> jax.Array:
        """[128, columns] of codes as numbers, in bfloat16 or float32, or integers in int8.

        Entries of a table are off by at most half a step of bfloat16.
        """
        from jax.experimental.pallas import tpu as pltpu

        if self.kind == "integers" and codes.dtype == jnp.uint8:
            return pltpu.bitcast(pltpu.bitcast(codes, jnp.int32) ^ _word(0x80808080), jnp.int8).astype(dtype)
        if self.kind == "integers":
            return codes.astype(dtype)
        words = pltpu.bitcast(codes, jnp.int32)
        if self.kind == "floats8":
            if self.element == _FNUZ:
                words = _bytes_in_fnuz(codes) if self.bytewise else _in_fnuz(words)
            return converted(pltpu.bitcast(words, jnp.dtype(self.element)), dtype)
        if self.bytewise:
            return self.scaled(codes, None, interpret=interpret).astype(dtype)
        if self.kind == "table":
            entries = table_words(self.table, rounded=dtype != jnp.float32)
            return _looked_up(words, entries, interpret=interpret).astype(dtype)
        # Sign, exponent and fraction in the places that they have in an 8-bit float.
        even = (words & _word(0x08080808)) << 4 | (words & _word(0x07070707)) << 1
        odd = words & _word(0x80808080) | _right(words, 3) & _word(0x0E0E0E0E)
        return converted(pltpu.bitcast(jnp.concatenate([even, odd], axis=0), jnp.float8_e5m2), dtype)

    def scaled(self, codes: jax.Array, scales: Sequence[jax.Array] | None, *, interpret: bool = False) -> jax.Array:
        """[128, columns] of codes as values in bfloat16, read from tables that are scaled before.

        Args:
          codes: of a decoder that is ``bytewise``.
          scales: for each `RUN` rows, [8, columns] with equal rows; None is 1.
          interpret: run in Pallas' interpreter.
        """
        from jax.experimental.pallas import tpu as pltpu

        columns, count = codes.shape[1], codes.shape[0] // RUN
        given = [None] if scales is None else scales
        tables = [_table_bytes(self.table, columns, scale, interpret) for scale in given]
        tables = tables * count if scales is None else tables
        return _gathered(pltpu.bitcast(codes, jnp.int32), tables, interpret=interpret)


def decoder(qtype: QType) -> Decoder:
    """The decoder for codes of a type in the form that `laid_out` stores."""
    if qtype.kind == "int":
        return Decoder("integers", shift=0 if qtype.signed else 8 if qtype.packed else 128)
    if qtype.kind == "float" and qtype.packed:
        return Decoder("floats4", factor=_SUBNORMAL)
    if qtype.element == "float8_e4m3fn":
        return Decoder("floats8", factor=16, element=_FNUZ)
    if qtype.kind == "float":
        return Decoder("floats8", element=str(qtype.element))
    return Decoder("table", table=tuple(qtype.table or ()))


def _in_fnuz(words: jax.Array) -> jax.Array:
    """Four patterns of float8_e4m3fn in each word as those of float8_e4m3b11fnuz: -0 is 0, and NaN is 0x80.

    A register has 4,096 codes, for which this takes ten operations. A conversion of float8_e4m3fn takes six for each
    1,024.
    """
    magnitude, low = words & _word(0x7F7F7F7F), _word(0x7F7F7F7F)
    unsigned = words & (magnitude + low | low)  # adding 127 sets the high bit of a byte that is not 0
    nan = (magnitude + _word(0x01010101)) & _word(0x80808080)
    return (unsigned | nan) ^ (nan - _right(nan, 7))


def _bytes_in_fnuz(codes: jax.Array) -> jax.Array:
    """`_in_fnuz` of the words of codes, in six operations on chips that compare bytes."""
    from jax.experimental.pallas import tpu as pltpu

    patterns = pltpu.bitcast(codes, jnp.int8)
    magnitude = patterns & 127
    numbers = jnp.where(magnitude != 0, patterns, jnp.int8(0))
    return pltpu.bitcast(jnp.where(magnitude ^ 127 != 0, numbers, jnp.int8(-128)), jnp.int32)


def _word(bits: int) -> jax.Array:
    return jnp.int32(np.uint32(bits).astype(np.int32))


def _right(x: jax.Array, count: int) -> jax.Array:
    return lax.shift_right_logical(x, jnp.int32(count)) if count else x


def table_words(table: tuple[float, ...], *, rounded: bool) -> tuple[int, ...]:
    """Words with two entries of a table each.

    The lower half of a word is the pattern in bfloat16 of the entry whose stored code (code - 8) has bit 3. The upper
    half is such that the word in float32 is as near as possible to the other entry, or if ``rounded`` is set, such that
    the word is rounded to this entry in bfloat16. (Beside a zero the lower half is below the smallest normal number.)
    """
    values = _entries(table)
    near = values.astype(jnp.bfloat16)
    lower = near[:8].view(np.uint16).astype(np.int64)
    other = near.astype(np.float32)[8:] if rounded else values[8:]
    upper = other.view(np.uint32).astype(np.int64) - lower + 0x8000 >> 16
    return tuple((np.where(other == 0, 0, upper) << 16 | lower).tolist())


def _entries(table: tuple[float, ...]) -> np.ndarray:
    values = np.zeros(16, np.float32)
    values[: len(table)] += np.asarray(table, np.float32)  # -0.0 is 0.0
    return values


def _table_bytes(
    table: tuple[float, ...], columns: int, scale: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The lower and the upper bytes of entries in bfloat16, times a scale for each column, by the bits of stored codes.

    Both are int8 [32, columns] and have each entry twice.
    """
    from jax.experimental.pallas import tpu as pltpu

    entries = _entries(table)[np.arange(16) ^ 8].view(np.uint32)  # a code is stored less 8
    row = lax.broadcasted_iota(jnp.int32, (8, columns), 0)

    def pairs(first: int) -> jax.Array:
        """Every second entry in bfloat16, two in a word."""
        real = lax.bitcast_convert_type(_of_rows(row, tuple(entries[first::2].tolist())), jnp.float32)
        real = real if scale is None else real * scale
        words = pltpu.bitcast(jnp.concatenate([real, real], axis=0).astype(jnp.bfloat16), jnp.int32)
        return lax.optimization_barrier(words) if interpret else words  # XLA merges conversions wrongly

    return _interleaved(pairs(0), pairs(1))


def _interleaved(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even bytes of the words of x and y by turns, and the odd bytes, in int8."""
    from jax.experimental.pallas import tpu as pltpu

    def bytes_of(x: jax.Array) -> jax.Array:
        return pltpu.bitcast(x, jnp.int8)

    odd = bytes_of(jnp.full(x.shape, _word(0xFF00FF00))) != 0
    return jnp.where(odd, bytes_of(y << 8), bytes_of(x)), jnp.where(odd, bytes_of(y), bytes_of(_right(x, 8)))


def _gathered(words: jax.Array, tables: list[tuple[jax.Array, jax.Array]], *, interpret: bool) -> jax.Array:
    """The entries of eight codes per word, in bfloat16, from tables of bytes for every eight rows of words."""
    from jax.experimental.pallas import tpu as pltpu

    def gathered(table: jax.Array, index: jax.Array) -> jax.Array:
        # The operation counts modulo the length of the table.
        index = pltpu.bitcast(index, jnp.int8)
        index = index.astype(jnp.int32) & 31 if interpret else index
        return pltpu.bitcast(jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds"), jnp.int32)

    found: list[list[jax.Array]] = [[], [], [], []]
    for i, (lower, upper) in enumerate(tables):
        word = words[8 * i : 8 * i + 8]
        for half, index in enumerate((word, _right(word, 4))):
            for j, pair in enumerate(_interleaved(gathered(lower, index), gathered(upper, index))):
                found[half + 2 * j].append(pltpu.bitcast(pair, jnp.bfloat16))
    return jnp.concatenate([v for run in found for v in run], axis=0)


def _of_rows(row: jax.Array, entries: tuple[int, ...]) -> jax.Array:
    """Entry i of a table of words where ``row`` is i."""
    table = jnp.zeros_like(row)
    for i, entry in enumerate(entries):
        table = jnp.where(row == i, _word(entry), table)
    return table


def _looked_up(words: jax.Array, entries: tuple[int, ...], *, interpret: bool) -> jax.Array:
    """The entries of eight codes per word, in float32."""
    rows, columns = len(entries), words.shape[1]
    table = _of_rows(lax.broadcasted_iota(jnp.int32, (rows, columns), 0), entries)
    found = []
    for place in range(0, 32, 4):
        for first in range(0, words.shape[0], rows):
            word = words[first : first + rows]
            # The operation counts modulo the length of the table.
            index = _right(word, place) & (rows - 1) if interpret else _right(word, place)
            entry = jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds")
            half = _right(word, place - 1) if place else word << 1
            found.append(lax.bitcast_convert_type(entry << (half & 16), jnp.float32))
    return jnp.concatenate(found, axis=0)


def converted(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``x.astype(dtype)`` of bytes, 8-bit floats or wider numbers, by conversions that kernels have in jax 0.6 too."""
    if x.dtype == jnp.uint8:
        return _unsigned(x).astype(dtype)
    return x.astype(jnp.float32).astype(dtype)


def _unsigned(x: jax.Array) -> jax.Array:
    """Bytes of any dtype as numbers from 0 to 255, in int32."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(x, jnp.int8).astype(jnp.int32) & 255


def scale_of(stored: jax.Array, form: str) -> jax.Array:
    """Scales in float32, from numbers or from 8-bit floats or their patterns."""
    from jax.experimental.pallas import tpu as pltpu

    if form == "float8_e4m3fn":
        return pltpu.bitcast(stored, jnp.float8_e4m3fn).astype(jnp.float32)
    if form != "float8_e8m0fnu":
        return converted(stored, jnp.float32)
    bits = _unsigned(stored)
    return jnp.where(bits == 255, jnp.nan, lax.bitcast_convert_type(bits << 23, jnp.float32))
