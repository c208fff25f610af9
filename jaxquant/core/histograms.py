"""Exact histograms of each block, over any number of batches: 2048 equal bins on ``[-span, span)``.

Spans are powers of two, the least above the absmax, so that a wider batch doubles the span and merges bins in pairs:
the state never grows and no element is lost, in whatever order batches are merged. A float32 that counts by ones stops
at 2**24, and an int32 turns negative at 2**31: a count is the nearest float32 (``counts``) and what that lacks
(``rest``), together exact up to 2**50 elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.core.arithmetic import exponent, power_of_two, times_power_of_two
from jaxquant.core.extremes import Axes, Range, absmax_over, finite_or_nan, only_counted

__all__ = ["BINS", "Limbs", "State", "centers", "edges", "empty", "merged", "of", "rows", "scatter", "shares"]

BINS = 2048
_LIMB = 20  # bits of the lower half of a count

State = dict[str, jax.Array]
"""``span`` of each block, ``counts`` and ``rest`` of its bins."""


def rows(x: jax.Array, axes: Axes) -> jax.Array:
    """The elements of each block in one last axis; the leading axes keep x's rank, with size 1 at ``axes``."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    order = tuple(i for i in range(x.ndim) if i not in axes) + tuple(axes)
    return jnp.transpose(x, order).reshape(*kept, math.prod(x.shape[i] for i in axes))


class Limbs(NamedTuple):
    """Exact counts, ``high * 2**20 + low``, as int32."""

    low: jax.Array
    high: jax.Array

    @classmethod
    def of(cls, counts: jax.Array, rest: jax.Array) -> Limbs:
        """From a float32 and its remainder."""
        high = jnp.floor(counts * 2.0**-_LIMB)
        return cls((counts - high * 2.0**_LIMB + rest).astype(jnp.int32), high.astype(jnp.int32)).carried()

    def carried(self) -> Limbs:
        """The same with the lower half from 0 to 2**20."""
        return Limbs(self.low & ((1 << _LIMB) - 1), self.high + (self.low >> _LIMB))

    def real(self) -> jax.Array:
        """The nearest float32, or its neighbour."""
        return self.high.astype(jnp.float32) * 2.0**_LIMB + self.low.astype(jnp.float32)

    def split(self) -> dict[str, jax.Array]:
        """Inverse of `of`."""
        counts = self.real()
        near = Limbs.of(counts, jnp.zeros_like(counts))
        rest = (self.high - near.high) * (1 << _LIMB) + (self.low - near.low)
        return {"counts": counts, "rest": rest.astype(jnp.float32)}

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> Limbs:
        """``fn`` of both halves."""
        return Limbs(fn(self.low), fn(self.high))

    def flipped(self) -> Limbs:
        """Bins from the last to the first."""
        return self.map(lambda half: jnp.flip(half, -1))

    def plus(self, other: Limbs) -> Limbs:
        """The counts of both."""
        return Limbs(self.low + other.low, self.high + other.high).carried()


def empty(shape: tuple[int, ...]) -> State:
    """Histograms of nothing, one for each place of ``shape``."""
    bins = (*shape, BINS)
    return {
        "span": jnp.zeros(shape, jnp.float32),
        "counts": jnp.zeros(bins, jnp.float32),
        "rest": jnp.zeros(bins, jnp.float32),
    }


def of(x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
    """The histograms of one array."""
    x = finite_or_nan(only_counted(x, counted))
    absmax = absmax_over(x, axes).astype(jnp.float32)
    least = jnp.maximum(exponent(absmax), -126)
    span = times_power_of_two(power_of_two(least), jnp.ones_like(least))
    span = jnp.where(absmax > 0, span, absmax)  # 0 stays 0, NaN stays NaN
    width = jnp.where(span > 0, span, 1)[..., None] / (BINS // 2)
    found = jnp.floor(rows(x, axes) / width).astype(jnp.int32) + BINS // 2
    found = jnp.clip(found, 0, BINS - 1)
    every = jnp.ones(found.shape, jnp.uint32)
    if counted is not None:
        every = rows(jnp.broadcast_to(counted, x.shape), axes).astype(jnp.uint32)
    count = scatter(found, every)  # of one array: less than 2**32
    limbs = Limbs(count & ((1 << _LIMB) - 1), count >> _LIMB).map(lambda half: half.astype(jnp.int32))
    return {"span": span, **limbs.split()}


def merged(a: State, b: State) -> State:
    """The histograms of both, with the wider span."""
    span = jnp.maximum(a["span"], b["span"])

    def widened(state: State) -> Limbs:
        doublings = jnp.clip(exponent(span) - exponent(state["span"]), 0, 31)
        position = jnp.arange(BINS, dtype=jnp.int32) - BINS // 2
        position = position.reshape((1,) * span.ndim + (-1,)) >> doublings[..., None]
        # 1024 lower halves in one bin stay below 2**30.
        return Limbs.of(state["counts"], state["rest"]).map(lambda half: scatter(position + BINS // 2, half))

    return {"span": span, **widened(a).plus(widened(b)).split()}


def centers(state: State) -> jax.Array:
    """The middle of each bin."""
    offset = (jnp.arange(BINS, dtype=jnp.float32) - (BINS // 2 - 0.5)) / (BINS // 2)
    return state["span"][..., None] * offset.reshape((1,) * state["span"].ndim + (-1,))


def shares(state: State) -> jax.Array:
    """The part of all elements that is in each bin."""
    return state["counts"] / jnp.maximum(jnp.sum(state["counts"], -1, keepdims=True), 1)


def edges(state: State) -> Range:
    """Outer edges of the occupied bins."""
    middle, half = centers(state), state["span"][..., None] / BINS
    seen = state["counts"] > 0
    lo = jnp.min(jnp.where(seen, middle - half, 0), axis=-1)
    hi = jnp.max(jnp.where(seen, middle + half, 0), axis=-1)
    nan = jnp.where(jnp.isnan(state["span"]), state["span"], 0)  # which min and max may drop
    return jnp.minimum(lo, 0) + nan, jnp.maximum(hi, 0) + nan


def scatter(index: jax.Array, weights: jax.Array) -> jax.Array:
    """Histogram along the last axis: weights added at index, leading axes kept."""
    flat_index, flat_weights = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (index, weights))
    flat_index = jnp.broadcast_to(flat_index, flat_weights.shape)

    def histogram(index: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.zeros(BINS, weights.dtype).at[index].add(weights)

    rows = jax.vmap(histogram)(flat_index, flat_weights)
    return rows.reshape(*weights.shape[:-1], BINS)
