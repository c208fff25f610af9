"""Few rows by a weight of a scale per group: codes are multiplied directly, and scales are applied to the sums.

The matrix unit takes 128 rows of the weight at a time. If these hold several groups, each row of x is repeated for each
group, with zeros in the other groups, so that one product gives the sums of all groups. With integer weights, a float x
is written as two int8 digits. Blocks of x may be larger than x: further rows hold nothing, and are not written.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.activation import DIGIT, DIGITS, FEW, digits, put_in_order, repeated
from jaxquant.ops.kernels.tpu.decode import BLOCK
from jaxquant.ops.kernels.tpu.grid import Body
from jaxquant.ops.kernels.tpu.loops import dot, lanes, looped
from jaxquant.ops.kernels.tpu.scales import in_blocks, row_of_blocks
from jaxquant.ops.kernels.tpu.widths import WIDTHS, equal_width, widest

__all__ = ["Sums"]


class Sums(Body):
    """Multiplies numbers, and scales the sums."""

    name = "grouped_sums"
    summed = True
    row_blocks = (256, 128)

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        found: list[tuple[tuple[int, ...], Any]] = [((bn // BLOCK, count, BLOCK), jnp.float32)]
        if self._prepared:
            found += [((len(self.planes) * bm, k), self.planes[0])]
        if self._spread:
            found += [((k // BLOCK, self._used(bm) * self.groups.in_block, BLOCK), self.planes[0])]
        if self._digits:
            found += [((bm, BLOCK), jnp.float32)]
        return found

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        spread = 2 * FEW * k if self._spread else 0
        return 2 * k * bn + 12 * k // self.groups.size * bn + 8 * bm * k + 16 * bm * bn + spread

    def _widths(self, m: int, k: int, n: int) -> list[int]:
        """As for `Body`; equal ones."""
        most = widest(k) if m <= DIGITS else WIDTHS[0]
        return [n] if n < BLOCK else [equal_width(n, width) for width in (most, *WIDTHS[1:])]

    @property
    def _digits(self) -> bool:
        return self.planes == (jnp.dtype(jnp.int8),) * 2

    @property
    def _spread(self) -> bool:
        """Whether rows are repeated for the groups of a block once, for all columns."""
        return self.planes == (jnp.dtype(jnp.bfloat16),) and self.groups.in_block > 1

    def _used(self, rows: int) -> int:
        """The number of rows of x, out of ``rows``, that are repeated."""
        return rows // 2 if self.half else rows

    @property
    def _prepared(self) -> bool:
        return len(self.planes) > 1 or self.groups.decoder.parts > 1 or self._spread

    def _prepare(self, x: jax.Ref, rows: int, blocks: int, scratch: list[jax.Ref]) -> None:
        """Writes the terms of x in the order in which codes are decoded, and repeats them for groups."""
        activation = scratch[0]
        if self._digits:
            first, second, step = digits(x[...].astype(jnp.float32))
            activation[:rows], activation[rows:] = first.astype(jnp.int8), second.astype(jnp.int8)
            scratch[1][...] = jnp.broadcast_to(step, scratch[1].shape)
            return
        terms, rest = [], x[...].astype(jnp.float32)
        for _ in self.planes:
            terms.append(rest.astype(jnp.bfloat16))
            rest = rest - terms[-1].astype(jnp.float32)
        for i, term in enumerate(terms):
            put_in_order(term, self.groups.decoder, activation, i * rows)
        for i in range(blocks if self._spread else 0):
            parts = repeated(activation[:, lanes(i)], self.groups, self._used(rows))
            scratch[1][i] = parts.astype(jnp.bfloat16)

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        from jax.experimental import pallas as pl

        group, decode, in_block = self.groups, self.groups.decoder, self.groups.in_block
        scales = scratch.pop(0)
        in_blocks(of["scale"], group.scale_form, scales)
        rows, activation = shape[0], x
        if self._prepared:
            activation = scratch[0]
            # Each of two cores prepares its own copy, in every step: it cannot tell which of its steps is the first.
            first = (pl.program_id(1) == 0) | (pl.num_programs(2) > 1) | (self.cores > 1)
            pl.when(first)(functools.partial(self._prepare, x, rows, codes.shape[0], scratch))
        planes, shifted = self._used(activation.shape[0]), "zero" in of or decode.shift != 0

        def block(i: Index, total: jax.Array) -> jax.Array:
            given = scratch[1][i] if self._spread else repeated(activation[:, lanes(i)], group, planes)
            dtype = activation.dtype
            numbers = decode.numbers(codes[i], dtype, interpret=self.interpret)
            sums = dot(given.astype(dtype), numbers).astype(jnp.float32)
            wide: Any = None
            if shifted or "offset" in of:
                wide = jnp.sum(given.astype(jnp.float32), axis=1, keepdims=True)
            for p in range(in_block):
                at = pl.ds(i * in_block + p if group.size <= BLOCK else i * BLOCK // group.size, 1)
                scale = row_of_blocks(scales, at)
                here = slice(p * planes, (p + 1) * planes)
                part = sums[here]
                if shifted:
                    zero = of["zero"][at, :].astype(jnp.float32) if "zero" in of else 0.0
                    part = part - wide[here] * (zero - decode.shift)
                part = (part.reshape(-1, 8, part.shape[1]) * scale[None]).reshape(part.shape)
                if "offset" in of:
                    part = part + wide[here] * of["offset"][at, :].astype(jnp.float32)
                total = total + part
            return total

        total = looped(codes.shape[0], block, jnp.zeros((planes, shape[1]), jnp.float32))
        if self._digits:
            total = (total[:rows] + total[rows:] * (1 / DIGIT)) * scratch[1][:, :1]
        elif planes > rows:
            total = total[:rows] + total[rows:]
        return jnp.concatenate([total, jnp.zeros_like(total)], axis=0) if self.half else total
