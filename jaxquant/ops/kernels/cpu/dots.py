"""Dots in the form that XLA's CPU backend runs fastest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.sizes import number
from jaxquant.ops.kernels.cpu import machine

__all__ = ["float_dot", "is_fast", "row_dot"]


def is_fast(dtype: DTypeLike) -> bool:
    """Whether products in a dtype of two bytes are faster than in float32."""
    return dtype == jnp.bfloat16 and machine.bfloat16_dots()


def float_dot(
    left: jax.Array, right: jax.Array, along: tuple[int, int] = (2, 2), precision: lax.PrecisionLike = None
) -> jax.Array:
    """The sum over an axis of each, [B, ., .] x [B, ., .], in float32 (or float64).

    bfloat16 has a fast path only to a float32 result, on CPUs with bfloat16 instructions. A single row has none.
    """
    numbers = ((along[0],), (along[1],)), ((0,), (0,))
    rows = (x.shape[3 - axis] for x, axis in zip((left, right), along, strict=True))
    if left.dtype.itemsize > 2:
        return lax.dot_general(left, right, numbers, precision=precision)
    if is_fast(left.dtype) and min(map(number, rows)) > 1:
        return lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)
    return lax.dot_general(left.astype(jnp.float32), right.astype(jnp.float32), numbers, precision=precision)


def row_dot(lhs: jax.Array, rhs: jax.Array, **how: Any) -> jax.Array:
    """[B, M, K] x [B, N, K] -> [B, M, N]."""
    return lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), **how)
