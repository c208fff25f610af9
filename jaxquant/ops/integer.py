"""Products of integer codes: int8 dots accumulated in int32, zero points corrected exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import promoted
from jaxquant.core.layout import number
from jaxquant.ops.matrix import Matrix, Packed

__all__ = ["common_group", "dot", "integer", "overflow_limit"]

_INT32_MAX = 2**31 - 1
_FEW_ROWS = 48


def dot(lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
    """[B, M, K] x [B, N, K] -> [B, M, N]."""
    return lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), **kwargs)


def _accumulate(lhs: jax.Array, rhs: jax.Array, rows_last: bool) -> jax.Array:
    """int8 [B, M, K] x [B, N, K] -> int32 [B, M, N], on the path that XLA's CPU library serves.

    One row is off that path, so it is padded to two. The operand with many rows (the weight, at inference) goes left
    when the other has few; the barrier keeps XLA from turning transpose(dot(w, x)) back into dot(x, w), which is
    slower. An operand that is stored with its rows last stays right, where the path takes it as it lies; XLA sees that
    it lies so, but for stacks of matrices, where it is told.
    """
    rows, columns = lhs.shape[1], rhs.shape[1]
    if rows == 1:
        lhs = jnp.pad(lhs, ((0, 0), (0, 1), (0, 0)))
    if columns == 1:
        rhs = jnp.pad(rhs, ((0, 0), (0, 1), (0, 0)))
    few, batched = number(rows) <= min(_FEW_ROWS, number(columns)), lhs.shape[0] != 1
    if few and not rows_last:
        out = jnp.swapaxes(lax.optimization_barrier(dot(rhs, lhs, preferred_element_type=jnp.int32)), 1, 2)
    elif few and batched:
        numbers = (((2,), (1,)), ((0,), (0,)))
        out = lax.dot_general(lhs, jnp.swapaxes(rhs, 1, 2), numbers, preferred_element_type=jnp.int32)
    else:
        out = dot(lhs, rhs, preferred_element_type=jnp.int32)
    return out[:, :rows, :columns]


def _corrected(
    lhs: jax.Array, rhs: jax.Array, lz: jax.Array | None, rz: jax.Array | None, rows_last: bool
) -> jax.Array:
    """sum_k (lhs - lz)(rhs - rz) in int32: exact whenever the result fits, since wrap-around cancels.

    ``rz`` is one per row, or where ``lz`` is None one per k for all rows.
    """
    out = _accumulate(lhs, rhs, rows_last)
    if rz is not None and rz.shape[2] > 1:
        return out - jnp.sum(lhs * rz, axis=2, keepdims=True)
    if rz is not None:
        rz = jnp.swapaxes(rz, 1, 2)
        out = out - rz * jnp.sum(lhs, axis=2, dtype=jnp.int32)[:, :, None]
    if lz is not None:
        out = out - lz * jnp.sum(rhs, axis=2, dtype=jnp.int32)[:, None, :]
    if lz is not None and rz is not None:
        out = out + lz * rz * jnp.int32(lhs.shape[2])
    return out


def overflow_limit(lhs_reach: int, rhs_reach: int) -> int:
    """The largest number of products of such magnitudes whose sum is sure to fit an int32."""
    return max(_INT32_MAX // (lhs_reach * rhs_reach), 1)


def common_group(*operands: Matrix | Packed) -> int:
    """The longest run of K within which no operand changes its scale."""
    runs = [x.shape[2] // x.groups for x in operands if x.groups != 1]
    return math.gcd(*runs) if runs else operands[0].shape[2]


def integer(lhs: Matrix, rhs: Matrix, combine: Callable[[jax.Array], jax.Array] = lambda out: out) -> jax.Array:
    """Integer dots, each exact in int32, scaled, combined and summed in float32.

    The contraction is cut where a scale or a zero point changes, and where a longer sum could overflow. ``combine`` is
    linear and may make the result smaller, which is best done before it is written to memory.
    """
    k, group = lhs.codes.shape[2], common_group(lhs, rhs)
    limit = overflow_limit(lhs.reach, rhs.reach)

    def part(start: Any, size: int) -> jax.Array:
        """Scaled product of ``size`` codes from ``start``, all in one group of either side."""

        def at(value: jax.Array) -> jax.Array:
            if value.shape[2] == 1:
                return value
            run = k // value.shape[2]
            return lax.dynamic_slice_in_dim(value, start // run, max(size // run, 1), axis=2)

        left, right = (
            x.codes if size == k else lax.dynamic_slice_in_dim(x.codes, start, size, axis=2) for x in (lhs, rhs)
        )
        lz, rz = (None if x.zero_point is None else at(x.zero_point) for x in (lhs, rhs))
        out = _corrected(left, right, lz, rz, rhs.rows_last).astype(jnp.float32)
        return combine(out * at(lhs.scale) * jnp.swapaxes(at(rhs.scale), 1, 2))

    if group > limit:  # few, long cuts of unequal length
        cuts = [part(c + s, min(limit, group - s)) for c in range(0, k, group) for s in range(0, group, limit)]
        return functools.reduce(jnp.add, cuts)
    if group == k:
        return part(0, k)
    dtype = promoted(lhs.scale.dtype, rhs.scale.dtype)
    # Zeros that vary over devices as the codes do; zeros_like are such in newer JAX only.
    left, right = ((x.codes[:, :, :1] * 0).astype(dtype) for x in (lhs, rhs))
    start = combine(left + jnp.swapaxes(right, 1, 2))
    return lax.fori_loop(0, k // group, lambda i, total: total + part(i * group, group), start)
