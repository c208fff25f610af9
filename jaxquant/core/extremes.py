"""Extremes of each block of an array: the ranges that clip nothing.

Infinite elements never widen a range (they saturate); NaN makes it NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import nan_where, promoted
from jaxquant.core.replaceable import Replaceable

__all__ = [
    "Axes",
    "Extreme",
    "Range",
    "absmax_over",
    "array_absmax",
    "extremes",
    "finite_or_nan",
    "minmax",
    "no_range",
    "only_counted",
    "or_nan",
]

Axes = tuple[int, ...]
Range = tuple[jax.Array, jax.Array]


def only_counted(x: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Sets values that do not count to 0, which lies in every range."""
    return x if counted is None else jnp.where(counted, x, jnp.zeros_like(x))


def finite_or_nan(x: jax.Array) -> jax.Array:
    """Sets infinities to 0; the result is at least float32."""
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.where(jnp.isinf(x), jnp.zeros_like(x), x)


def no_range(shape: tuple[int, ...] = ()) -> Range:
    """The range before any observation: empty, since its end is below its start."""
    return jnp.ones(shape, jnp.float32), -jnp.ones(shape, jnp.float32)


def or_nan(lo: jax.Array, hi: jax.Array) -> Range:
    """The range, with NaN where it is empty, so that results of a compiled program are NaN too."""
    return nan_where(~(lo <= hi), lo), nan_where(~(lo <= hi), hi)


class Extreme(NamedTuple):
    """A reduction: of ``prepare(x)``, by ``pair`` of two elements, ``reduce`` of an array."""

    prepare: Callable[[jax.Array], jax.Array]
    pair: Callable[[jax.Array, jax.Array], jax.Array]
    reduce: Callable[..., jax.Array]

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The reduction of each block, 0 included."""
        return self.reduce(self.prepare(x), axis=axes, keepdims=True, initial=0)


def _itself(x: jax.Array) -> jax.Array:
    return x


_ABSMAX = Extreme(jnp.abs, jnp.maximum, jnp.max)
_MIN = Extreme(_itself, jnp.minimum, jnp.min)
_MAX = Extreme(_itself, jnp.maximum, jnp.max)


def _extremes(x: jax.Array, axes: Axes, *reductions: Extreme) -> tuple[jax.Array, ...]:
    """Reductions of each block (max or min, 0 included): infinities count as 0, NaN gives NaN. In at least float32."""
    x = lax.stop_gradient(x)  # a range counts as constant
    if x.dtype.itemsize < 2:
        x = x.astype(jnp.float32)
    return tuple(v.astype(promoted(v.dtype, jnp.float32)) for v in extremes(x, axes=axes, reductions=reductions))


@Replaceable
def extremes(x: jax.Array, *, axes: Axes, reductions: tuple[Extreme, ...]) -> tuple[jax.Array, ...]:
    """The same, in x's dtype."""
    finite = jnp.where(jnp.isinf(x), jnp.zeros_like(x), x)
    return tuple(to(finite, axes) for to in reductions)


def absmax_over(x: jax.Array, axes: Axes) -> jax.Array:
    """The largest finite magnitude along axes, which keep size 1; NaN if there is a NaN."""
    return _extremes(x, axes, _ABSMAX)[0]


def array_absmax(x: jax.Array) -> jax.Array:
    """The largest finite magnitude of an array, a scalar; NaN if it holds one."""
    return absmax_over(x, tuple(range(x.ndim))).reshape(())


def minmax(x: jax.Array, axes: Axes) -> Range:
    """The smallest and the largest finite element along axes, 0 included; NaN if there is a NaN."""
    lo, hi = _extremes(x, axes, _MIN, _MAX)
    return lo, hi
