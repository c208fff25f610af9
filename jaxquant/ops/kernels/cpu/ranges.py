"""The ranges of arrays, by reductions as XLA's CPU backend has them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.observers import Axes, Extreme, extremes
from jaxquant.core.sizes import number
from jaxquant.ops.kernels.cpu.layout import LARGE

__all__ = ["library_extremes"]

_LONGEST_RUN = 64
_GROUP = 256  # longer axes may be spread over devices
_SMALL = 1 << 8


@extremes.on("cpu")
def library_extremes(x: jax.Array, *, axes: Axes, reductions: tuple[Extreme, ...]) -> tuple[jax.Array, ...]:
    """Reductions of each block, with infinities as 0.

    XLA gives a reduction to a library that is fast, fuses abs and nothing else, and whose max and min drop NaN. It is
    used where the array is finite, as a sum shows; elsewhere NaN and infinities are looked for first, and what that
    writes is a small part of the array.
    """

    def looked_for(x: jax.Array, to: Extreme) -> jax.Array:
        # Of standard reductions only: XLA cannot spread another one over devices, if the array is cut along these axes.
        x = _folded(x, axes, to)
        nan, finite = jnp.any(jnp.isnan(x), axis=axes, keepdims=True), jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        return jnp.where(nan, np.asarray(np.nan, x.dtype), to(finite, axes))

    def explicit(x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(looked_for(x, to) for to in reductions)

    if number(x.size) <= _SMALL:
        return explicit(x)
    total = jnp.sum(lax.optimization_barrier(x))  # behind the barrier, widening a bfloat16 array is part of the sum
    return lax.cond(jnp.isfinite(total), lambda x: tuple(to(x, axes) for to in reductions), explicit, x)


def _folded(x: jax.Array, axes: Axes, to: Extreme) -> jax.Array:
    """An array of the same reductions, NaN included, without infinities, and up to 64 times smaller.

    A loop takes one of each run of elements along the longest of the axes, so that no more is written. The length of
    runs divides that axis, and the number of runs is a multiple of 8 unless it is a group's: an array that is spread
    over as many devices stays where it is.
    """
    if not LARGE <= number(x.size) < math.inf or not axes:
        return x
    axis = max(axes, key=lambda i: x.shape[i]) % x.ndim
    length = x.shape[axis]
    counts = [n for n in range(1, _LONGEST_RUN + 1) if length % n == 0]
    count = max(counts if length <= _GROUP else [n for n in counts if length // n % 8 == 0] or counts)
    runs = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])

    def part(i: Any) -> jax.Array:
        v = lax.dynamic_index_in_dim(runs, i, axis + 1, keepdims=False)
        return to.prepare(jnp.where(jnp.isinf(v), jnp.zeros_like(v), v))

    return lax.fori_loop(1, count, lambda i, found: to.pair(found, part(i)), part(0))
