"""The ranges of arrays, by reductions that XLA's CPU backend runs fast."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import nan_where
from jaxquant.core.extremes import Axes, Extreme, extremes
from jaxquant.core.sizes import number
from jaxquant.core.types import Index
from jaxquant.ops.kernels.cpu.layout import LARGE

__all__ = ["library_extremes"]

_LONGEST_RUN = 64
_GROUP = 256  # longer axes may be spread over devices
_SMALL = 1 << 8


@extremes.on("cpu")
def library_extremes(x: jax.Array, *, axes: Axes, reductions: tuple[Extreme, ...]) -> tuple[jax.Array, ...]:
    """Reductions of each block, with infinities as 0.

    XLA hands a reduction to a fast library, which fuses only abs, and whose max and min drop NaN. If the array is
    finite, as a sum shows, the library is used. Otherwise a first pass handles NaN and infinities, and writes a small
    array.
    """

    def looked_for(x: jax.Array, to: Extreme) -> jax.Array:
        # Standard reductions only: XLA cannot partition others over devices if these axes are sharded.
        x = _folded(x, axes, to)
        nan, finite = jnp.any(jnp.isnan(x), axis=axes, keepdims=True), jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        return nan_where(nan, to(finite, axes))

    def explicit(x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(looked_for(x, to) for to in reductions)

    if number(x.size) <= _SMALL:
        return explicit(x)
    total = jnp.sum(lax.optimization_barrier(x))  # behind the barrier, widening a bfloat16 array is part of the sum
    return lax.cond(jnp.isfinite(total), lambda x: tuple(to(x, axes) for to in reductions), explicit, x)


def _folded(x: jax.Array, axes: Axes, to: Extreme) -> jax.Array:
    """An array with the same reductions, NaN included, without infinities, and up to 64 times smaller.

    A loop reduces each run of elements along the longest of the axes to one. The length of runs divides that axis, and
    the number of runs is a multiple of 8 except in groups, so that an array sharded over 8 devices (or a divisor) stays
    in place.
    """
    if not LARGE <= number(x.size) < math.inf or not axes:
        return x
    axis = max(axes, key=lambda i: x.shape[i]) % x.ndim
    length = x.shape[axis]
    counts = [n for n in range(1, _LONGEST_RUN + 1) if length % n == 0]
    count = max(counts if length <= _GROUP else [n for n in counts if length // n % 8 == 0] or counts)
    runs = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])

    def part(i: Index) -> jax.Array:
        v = lax.dynamic_index_in_dim(runs, i, axis + 1, keepdims=False)
        return to.prepare(jnp.where(jnp.isinf(v), jnp.zeros_like(v), v))

    return lax.fori_loop(1, count, lambda i, found: to.pair(found, part(i)), part(0))
