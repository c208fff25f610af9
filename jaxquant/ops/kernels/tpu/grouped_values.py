"""Many rows by a weight of a scale per group: values are decoded once, and all rows are multiplied with them.

A block of columns is decoded, with its scales, into the chip's own memory. One scale of a whole column multiplies its
sum instead, so that nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.activation import FEW, put_in_order
from jaxquant.ops.kernels.tpu.decode import BLOCK, RUN, scale_of
from jaxquant.ops.kernels.tpu.grid import Body, is_of_columns
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.loops import dot, lanes, looped
from jaxquant.ops.kernels.tpu.scales import in_blocks, repeated_scales, row_of_blocks

__all__ = ["Values", "ValuesInParts"]

_PART = 1024  # the shortest part of K


class Values(Body):
    """Multiplies values, which are decoded once for all rows."""

    name = "grouped_values"
    summed = False
    row_blocks = (512, 256, 128)

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        found: list[tuple[tuple[int, ...], Any]] = [((bn // BLOCK, count, BLOCK), jnp.float32)]
        found += [((k, bn), jnp.bfloat16)] if bm > FEW else []
        return found + ([((bm, bk), jnp.bfloat16)] if self.groups.decoder.parts > 1 else [])

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        sums = 4 * bm * bn if bk < k else 0
        return (3 * bk + 2 * k) * bn + 16 * k // self.groups.size * bn + 6 * bm * bk + 12 * bm * bn + sums

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        from jax.experimental import pallas as pl

        group, decode = self.groups, self.groups.decoder
        count, scales = codes.shape[0], scratch.pop(0)
        part = pl.program_id(3)
        start = part * count if scales.shape[1] * group.size > x.shape[1] else 0  # the first block of the part of K

        if not is_of_columns(of):
            first = (pl.program_id(2) == 0) & (part == 0)
            pl.when(first)(functools.partial(in_blocks, of["scale"], group.scale_form, scales))

        weight = _Weight(group, codes, of, scales, start, self.interpret)
        activation = x
        if decode.parts > 1:
            activation = scratch.pop()
            put_in_order(x[...], decode, activation, 0)
        if not scratch:  # few rows: a block is multiplied while the next is decoded

            def step(i: Index, total: jax.Array) -> jax.Array:
                return total + dot(activation[:, lanes(i)].astype(jnp.bfloat16), weight.values(i))

            return looped(count, step, jnp.zeros(shape, jnp.float32))
        (values,) = scratch

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            def store(i: Index, total: int) -> int:
                values[lanes(start + i), :] = weight.values(i)
                return total

            looped(count, store, 0)

        return dot(activation[...].astype(jnp.bfloat16), values[lanes(start, count), :])


class ValuesInParts(Values):
    """`Values` whose x is in memory for a part of K at a time, so that blocks have as many columns as for a short K.

    On a v6e x would be read for so few columns at a time that reading takes longer than multiplying: for 512 rows of
    [14336, 4096] 324 thousand cycles, 234 in parts. On a v5e it takes 500 as a whole and 574 in parts.
    """

    def _parts(self, bm: int, k: int) -> list[int]:
        """Whole blocks and groups; K is whole with few rows, for which values are not kept."""
        unit = max(self.groups.size, BLOCK)
        counts = range(1, k // _PART + 1) if bm > FEW else ()
        return [k // count for count in counts if k % (count * unit) == 0] or [k]


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A part of K of a block of columns, in the memory of the chip.

    Attributes:
      groups: of the weight.
      codes: of the part, in blocks of 128 rows.
      of: scales, and zero points and offsets if there are any, of all of K.
      scales: the same scales, as `in_blocks` wrote them unless columns have one each.
      start: the first block of the part.
      interpret: whether Pallas' interpreter runs it.
    """

    groups: Groups
    codes: jax.Ref
    of: dict[str, jax.Ref]
    scales: jax.Ref
    start: Index
    interpret: bool

    def values(self, i: Index) -> jax.Array:
        """The i-th block of the part, in bfloat16: not scaled if columns have one scale each."""
        if is_of_columns(self.of):
            return self._unscaled(i)
        if self.groups.scales_tables and "offset" not in self.of:
            return self._by_scaled_tables(i)
        if self.groups.scales_exactly and self.groups.in_block > 1 and "offset" not in self.of:
            return self._scaled_exactly(i)
        return self._scaled(i)

    def _numbers(self, i: Index, dtype: DTypeLike) -> jax.Array:
        return self.groups.decoder.numbers(self.codes[i], dtype, interpret=self.interpret)

    def _unscaled(self, i: Index) -> jax.Array:
        shift = self.groups.decoder.shift
        if "zero" not in self.of and shift == 0:
            return self._numbers(i, jnp.bfloat16)
        zero = self.of["zero"][...].astype(jnp.float32) if "zero" in self.of else 0.0
        value = self._numbers(i, jnp.float32) - (zero - shift)
        return value.astype(jnp.bfloat16)

    def _by_scaled_tables(self, i: Index) -> jax.Array:
        from jax.experimental import pallas as pl

        starts = [pl.ds(((self.start + i) * BLOCK + row) // self.groups.size, 1) for row in range(0, BLOCK, RUN)]
        codes, scales = self.codes[i], [row_of_blocks(self.scales, at) for at in starts]
        return self.groups.decoder.scaled(codes, scales, interpret=self.interpret)

    def _scaled_exactly(self, i: Index) -> jax.Array:
        """Values by products in bfloat16."""
        decode, count = self.groups.decoder, self.groups.in_block
        scale = repeated_scales(self.scales, (self.start + i) * count, count, self._run)
        scale = (scale if decode.factor == 1 else scale * decode.factor).astype(jnp.bfloat16)
        value = self._numbers(i, jnp.bfloat16)
        return (value.reshape(decode.parts, self._run, -1) * scale[None]).reshape(value.shape)

    def _scaled(self, i: Index) -> jax.Array:
        """Values by products in float32."""
        decode = self.groups.decoder
        value = self._numbers(i, jnp.float32)
        value = value.reshape(decode.parts, 1 if self._shared else self.groups.in_block, -1, 8, value.shape[1])
        if "zero" in self.of:
            value = value - (self._by_row("zero", i) - decode.shift)
        elif decode.shift:
            value = value + decode.shift
        scale = self._by_row("scale", i)
        value = value * (scale if decode.factor == 1 else scale * decode.factor)
        if "offset" in self.of:
            value = value + self._by_row("offset", i)
        return value.reshape(BLOCK, -1).astype(jnp.bfloat16)

    @property
    def _run(self) -> int:
        """Rows of a run, as `Decoder.parts` has them."""
        return BLOCK // self.groups.decoder.parts

    @property
    def _shared(self) -> bool:
        """Whether several groups are in a register."""
        return self._run // self.groups.in_block < 8

    def _by_row(self, name: str, i: Index) -> jax.Array:
        """Values of the groups of a block, shaped to multiply [parts, groups, rows of both / 8, 8, columns]."""
        from jax.experimental import pallas as pl

        size, count, block = self.groups.size, self.groups.in_block, self.start + i
        first = block * count if size <= BLOCK else block * BLOCK // size
        if name == "scale" and not self._shared:
            rows = [row_of_blocks(self.scales, pl.ds(first + p, 1)) for p in range(count)]
            return jnp.stack(rows)[None, :, None]
        value = self.of[name][pl.ds(first, count), :]
        value = scale_of(value, self.groups.scale_form if name == "scale" else "float32")
        if not self._shared:
            return value[None, :, None, None, :]
        row = lax.broadcasted_iota(jnp.int32, (self._run, value.shape[1]), 0)
        rows = value[:1]
        for p in range(1, count):
            rows = jnp.where(row >= p * self._run // count, value[p : p + 1], rows)
        return rows.reshape(1, 1, -1, 8, rows.shape[1])
