"""The clip of least squared error: a search over ranges, then alternating least squares between codes and scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import sums
from jaxquant.core.extremes import Axes, Range

__all__ = ["Roundtrip", "evaluator", "least_error"]

Roundtrip = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(x, lo, hi) -> values``: quantizes with a range, and dequantizes."""

Evaluate = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
_Best = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # error, lo, hi, gain

_RATIOS = tuple(0.95**k for k in range(90))  # 1 down to 0.01
_REFINEMENTS = 8


def _repeated(start: int, stop: int, step: Callable[[jax.Array, _Best], _Best], best: _Best) -> _Best:
    return cast(_Best, lax.fori_loop(start, stop, step, best))


def least_error(evaluate: Evaluate, lo: jax.Array, hi: jax.Array, both: bool) -> Range:
    """The clip of least squared error, per block.

    Args:
      evaluate: ``(lo, hi) -> (error, gain)``; gain is the least-squares factor ``<x, v> / <v, v>`` of the values v.
      lo, hi: the range that clips nothing.
      both: also search the two ends separately (asymmetric ranges).
    """

    def better(best: _Best, new_lo: jax.Array, new_hi: jax.Array) -> _Best:
        error, gain = evaluate(new_lo, new_hi)
        old_error, old_lo, old_hi, old_gain = best
        won = error < old_error
        return (
            jnp.where(won, error, old_error),
            jnp.where(won, new_lo, old_lo),
            jnp.where(won, new_hi, old_hi),
            jnp.where(won, gain, old_gain),
        )

    ratios = jnp.asarray(_RATIOS, lo.dtype)
    # The full range is tried inside the loop too: compiled by itself, its sums could differ in the last bit.
    best = (jnp.full_like(lo, math.inf), lo, hi, jnp.ones_like(lo))
    best = _repeated(0, len(_RATIOS), lambda i, b: better(b, lo * ratios[i], hi * ratios[i]), best)
    if both:
        for end in (0, 1):
            start = best

            def one_end(i: jax.Array, b: _Best, start: _Best = start, end: int = end) -> _Best:
                return better(b, start[1] * (1 if end else ratios[i]), start[2] * (ratios[i] if end else 1))

            best = _repeated(1, len(_RATIOS), one_end, best)
    # Alternate: codes for the best scale, then the best scale for those codes. Neither step raises the error.
    best = _repeated(0, _REFINEMENTS, lambda _, b: better(b, b[1] * b[3], b[2] * b[3]), best)
    return best[1], best[2]


def evaluator(x: jax.Array, weights: jax.Array | None, axes: Axes, unit: jax.Array, roundtrip: Roundtrip) -> Evaluate:
    """Squared error and least-squares gain, in units of each block's absmax so that nothing over- or underflows."""

    def evaluate(lo: jax.Array, hi: jax.Array) -> Range:
        v = roundtrip(x, lo, hi) / unit
        xn = x / unit
        terms = ((xn - v) ** 2, xn * v, v * v)
        error, xv, vv = sums(*(t if weights is None else t * weights for t in terms), axes=axes)
        return error, jnp.where(vv > 0, xv / jnp.where(vv > 0, vv, 1), 1)

    return evaluate
