"""Loops over the blocks of 128 elements along K, and the product of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.decode import BLOCK

__all__ = ["dot", "lanes", "looped"]

T = TypeVar("T")

_UNROLLED = 32  # blocks that the compiler schedules together


def lanes(i: Index, count: int = 1) -> Any:
    """The elements of ``count`` blocks from the i-th on."""
    from jax.experimental import pallas as pl

    return pl.ds(i * BLOCK if isinstance(i, int) else pl.multiple_of(i * BLOCK, BLOCK), count * BLOCK)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices, with sums in int32 of int8, and in float32 of floats."""
    return jnp.dot(x, w, preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32)


def looped(count: int, step: Callable[[Index, T], T], start: T) -> T:
    """Applies ``step`` ``count`` times, in an unrolled loop."""
    whole = count - count % _UNROLLED if count > _UNROLLED else 0

    def several(i: jax.Array, total: T) -> T:
        for j in range(_UNROLLED):
            total = step(i * _UNROLLED + j, total)
        return total

    total = lax.fori_loop(0, whole // _UNROLLED, several, start) if whole else start
    for i in range(whole, count):
        total = step(i, total)
    return total
