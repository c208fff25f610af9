"""Rows of an activation in the form in which they are multiplied with decoded codes.

They are split into terms that the matrix unit multiplies, brought to the order in which codes are decoded, and repeated
for each group of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.ops.kernels.tpu.decode import BLOCK, Decoder
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.loops import dot

__all__ = ["DIGIT", "DIGITS", "FEW", "digits", "planes_of", "put_in_order", "repeated", "rows_of_sums"]

FEW = 128
"""The most rows (times terms of x and groups of a block) for which sums of floats and tables are scaled."""

DIGITS = 64
"""The same limit for integers; up to it a bfloat16 x is written as int8 digits."""

DIGIT = 254.0
"""How many times as large the first digit's unit is as the second's."""


def rows_of_sums(rows: int, dtype: DTypeLike, groups: Groups) -> int:
    """The number of rows that `Sums` multiplies for ``rows`` rows of x."""
    return rows * groups.in_block * len(planes_of(rows, dtype, groups))


def planes_of(rows: int, dtype: DTypeLike, groups: Groups) -> tuple[np.dtype, ...]:
    """The dtypes of the terms that x is split into for the matrix unit."""
    if not groups.multiplies_integers:
        return (jnp.dtype(jnp.bfloat16),) * (2 if dtype == jnp.float32 else 1)
    if dtype == jnp.int8:
        return (jnp.dtype(jnp.int8),)
    if dtype == jnp.bfloat16 and 2 * rows * groups.in_block > DIGITS:
        return (jnp.dtype(jnp.bfloat16),)
    return (jnp.dtype(jnp.int8),) * 2


def digits(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x = step * (first + second / DIGIT)``, to 4e-5 of the largest element of a row; integers, and steps [M, 1]."""
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    step = jnp.where(largest == 0, 1.0, jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny))
    scaled = x / step
    first = jnp.clip(jnp.round(scaled), -127, 127)
    second = jnp.clip(jnp.round((scaled - first) * DIGIT), -127, 127)
    return first, second, step


def repeated(x: jax.Array, groups: Groups, rows: int) -> jax.Array:
    """Repeats rows of x for each group of a block, with zeros in the other groups: [groups * rows, 128], in 32 bits."""
    if groups.in_block == 1:
        return x
    wide = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)[:rows]
    lane = groups.decoder.source(lax.broadcasted_iota(jnp.int32, wide.shape, 1)) >> groups.size.bit_length() - 1
    return jnp.concatenate([jnp.where(lane == p, wide, 0) for p in range(groups.in_block)], axis=0)


def put_in_order(x: jax.Array, decode: Decoder, out: jax.Ref, first: int) -> None:
    """Writes rows of x with each 128 elements in the order of decoded codes, by a product with a permutation."""
    x, rows = x.astype(jnp.bfloat16), slice(first, first + x.shape[0])
    if decode.parts == 1:
        out[rows, :] = x
        return
    row, place = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    order = (row == decode.source(place)).astype(jnp.float32).astype(jnp.bfloat16)
    for i in range(0, x.shape[1], BLOCK):
        out[rows, i : i + BLOCK] = dot(x[:, i : i + BLOCK], order).astype(jnp.bfloat16)
