"""Lookups of columns, for a table that is stored transposed because a product multiplies it.

XLA does not gather along the last axis: it copies the whole table to another order first, which takes 1,431 thousand
cycles for 8 columns of [4096, 32000] in int4 on a v5e. The kernel reads the 128 columns around each index, and takes
10.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.ops.take import taken

__all__ = ["columns"]

_LANES = 128


def _fits(codes: jax.Array, indices: jax.Array, *, axis: int) -> bool:
    """Whether the last axis is indexed, of codes of 4 or 8 bits in whole registers."""
    if axis != codes.ndim - 1 or codes.ndim < 2 or indices.ndim != 1:
        return False
    if not all(math.isfinite(number(n)) for n in (*codes.shape, *indices.shape)) or not indices.size:
        return False
    rows, bits = math.prod(codes.shape[:-1]), _bits(codes)
    whole = codes.shape[-2] % (256 // bits) == 0 and codes.shape[-1] >= _LANES
    return bits in (4, 8) and whole and rows * _LANES * bits // 8 <= MEMORY // 8


def _bits(codes: jax.Array) -> int:
    return 4 if codes.dtype in (jnp.int4, jnp.uint4) else 8 * codes.dtype.itemsize


@functools.partial(jax.jit, static_argnames="interpret")
def columns(codes: jax.Array, indices: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Columns of a matrix at valid indices.

    The column is rotated to its place among 128 of the result, as words of several rows.

    Args:
      codes: [K, N], of 4 or 8 bits.
      indices: integers [M].
      interpret: run in Pallas' interpreter.

    Returns:
      [K, M].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(at, codes, out):
        i = pl.program_id(0)
        words = pltpu.bitcast(codes[...], jnp.int32)
        words = pltpu.roll(words, lax.rem(i - lax.rem(at[i], _LANES) + _LANES, _LANES), 1)
        mine = lax.broadcasted_iota(jnp.int32, words.shape, 1) == lax.rem(i, _LANES)

        @pl.when(lax.rem(i, _LANES) == 0)
        def _() -> None:
            out[...] = pltpu.bitcast(words, out.dtype)

        @pl.when(lax.rem(i, _LANES) != 0)
        def _() -> None:
            out[...] = pltpu.bitcast(jnp.where(mine, words, pltpu.bitcast(out[...], jnp.int32)), out.dtype)

    rows, count = codes.shape[0], indices.shape[0]
    moved = count * rows * (_LANES + 1) * _bits(codes) // 8
    own = jnp.int8 if _bits(codes) == 8 else codes.dtype  # a v6e's compiler gives no estimate of fp8 that is written
    found = pl.pallas_call(
        kernel,
        out_shape=shape_like(codes, (rows, count), own),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count,),
            in_specs=[pl.BlockSpec((rows, _LANES), lambda i, at: (0, lax.div(at[i], _LANES)))],
            out_specs=pl.BlockSpec((rows, _LANES), lambda i, at: (0, lax.div(i, _LANES))),
        ),
        interpret=interpret,
        compiler_params=compiler_params(LIMIT, interpret=interpret),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name="columns",
    )(indices.astype(jnp.int32), codes)
    return lax.bitcast_convert_type(found, codes.dtype)


@taken.on("tpu", when=_fits)
def taken_columns(codes: jax.Array, indices: jax.Array, *, axis: int) -> jax.Array:
    """`columns` of codes with several axes before the last; by XLA where a program is divided over devices."""

    def kernel(codes: jax.Array, indices: jax.Array) -> jax.Array:
        found = columns(codes.reshape(-1, codes.shape[-1]), indices)
        return found.reshape(*codes.shape[:-1], -1)

    def divided(codes: jax.Array, indices: jax.Array) -> jax.Array:
        return taken.plainly(codes, indices, axis=axis)

    return if_undivided(kernel, divided, codes, indices)
