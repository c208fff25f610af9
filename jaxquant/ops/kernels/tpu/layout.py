"""Brings activations to the order in which products take them, where XLA takes longer.

An int8 product runs at half the speed where both operands have the summed axis first, so codes are transposed.
Estimate of the TPU compiler for the sum over 4,096 rows of [4096, 4096] on both sides, on a v5e: 1,089 thousand cycles,
as in bfloat16; with the summed axis last on one side 545, and 45 for the transpose here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number
from jaxquant.ops.kernels.tpu.pallas import compiler_params, shape_like
from jaxquant.ops.kernels.tpu.undivided import if_undivided

__all__ = ["in_tiles", "rows_last", "side_by_side", "transposed_codes"]

_LEAST, _BLOCK = 1 << 18, 1024  # fewest elements for which it pays; rows and columns of a block

_ROWS, _TILE = 512, (8, 128)  # fewest rows that are moved tile by tile; a tile, as arrays are stored


def transposed_codes(x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """int8 [M, K] as [K, M]."""
    from jax.experimental import pallas as pl

    m, k = x.shape
    rows, columns = min(m, _BLOCK), min(k, _BLOCK)

    def kernel(x: jax.Ref, out: jax.Ref) -> None:
        out[...] = x[...].T

    return pl.pallas_call(
        kernel,
        out_shape=shape_like(x, (k, m), x.dtype),
        grid=(pl.cdiv(m, rows), pl.cdiv(k, columns)),
        in_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((columns, rows), lambda i, j: (j, i)),
        compiler_params=compiler_params(order=("parallel",) * 2, interpret=interpret),
        interpret=interpret,
        name="transposed_codes",
    )(x)


def rows_last(x: jax.Array) -> jax.Array:
    """[B, rows, k] as [B, k, rows]: large codes in one matrix by the kernel, all else as XLA likes."""
    _, m, k = map(number, x.shape)
    fits = x.dtype == jnp.int8 and x.shape[0] == 1 and math.isfinite(m * k) and m * k >= _LEAST

    def kernel(x: jax.Array) -> jax.Array:
        return transposed_codes(x[0])[None]

    def divided(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2)

    return if_undivided(kernel, divided, x) if fits and m % 128 == 0 and k % 128 == 0 else divided(x)


def side_by_side(x: jax.Array, count: int) -> jax.Array:
    """[..., rows, heads, width] with its last ``count`` axes joined.

    Attention makes the heads before the rows. Reshaped alone, they are first moved between the rows, and joined in
    another pass; here whole tiles move, in one pass. For [1, 32, 2048, 128], which a kernel made, XLA's estimates are
    54 thousand cycles and not 225 on a v6e, and 84 and not 270 on a v5e.
    """
    *lead, rows = x.shape[:-count]
    heads, width = x.shape[-count:-1], x.shape[-1]
    joined = (*lead, rows, math.prod(heads) * width)
    if count == 1 or not all(isinstance(n, int) for n in (rows, width)):
        return x.reshape(joined)
    if rows < _ROWS or rows % _TILE[0] or width % _TILE[1]:
        return x.reshape(joined)
    first = jnp.moveaxis(x.reshape(*lead, rows, -1, width), -2, -3)
    tiles = first.reshape(*first.shape[:-2], rows // _TILE[0], _TILE[0], width)
    return jnp.moveaxis(tiles, -4, -2).reshape(joined)


def in_tiles(result: jax.Array) -> jax.Array:
    """A kernel's result [..., rows, columns]. XLA splits it into heads in one pass, which moves whole tiles.

    The barrier shows XLA the tiles that the kernel wrote. Without it XLA moves the heads between the rows, and puts
    them in order in another pass: for [4096, 4096] as [2, 32, 2048, 128] it estimates 537 thousand cycles on a v5e,
    and 167 with it. Other users read the result where it is.
    """
    *lead, rows, columns = (1, *result.shape)
    if result.ndim < 2 or not isinstance(rows, int) or rows < _ROWS or rows % _TILE[0] or columns % _TILE[1]:
        return result
    tiles = result.reshape(*lead, rows // _TILE[0], _TILE[0], columns // _TILE[1], _TILE[1])
    return jnp.swapaxes(lax.optimization_barrier(jnp.swapaxes(tiles, -3, -2)), -3, -2).reshape(result.shape)
