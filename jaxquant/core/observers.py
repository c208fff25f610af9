"""Range calibrators: which ``(lo, hi)`` the codes of a block should cover.

Each calibrator is a small frozen dataclass with two ways to the same answer:

- ``range(x, axes, ...)``: the range of the very array at hand (weights, dynamic activations);
- ``init(shape)``, ``update(state, x, axes)``, ``result(state, ...)``: over many batches, with a plain pytree as state,
  so that it can live inside ``jit`` and ``scan``, be merged across hosts and be saved.

``axes`` are the axes of ``x`` that one block spans; results keep them with size 1. ``roundtrip(x, lo, hi)`` is supplied
by the caller: quantize and dequantize with that range. Infinite elements never widen a range (they saturate); NaN makes
it NaN. ``counted`` says which elements count, as a boolean array of x's shape or one that broadcasts to it; None: all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.arithmetic import exponent, power_of_two, promoted, times_power_of_two
from jaxquant.core.errors import quant_error
from jaxquant.core.replaceable import Replaceable

__all__ = ["EMA", "MSE", "AbsMax", "AbsMean", "Entropy", "MinMax", "Observer", "Percentile", "no_range", "or_nan"]

Roundtrip = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Axes = tuple[int, ...]
Range = tuple[jax.Array, jax.Array]


def _only(x: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Sets values that do not count to 0, which lies in every range."""
    return x if counted is None else jnp.where(counted, x, jnp.zeros_like(x))


def _finite_or_nan(x: jax.Array) -> jax.Array:
    """Sets infinities to 0; the result is at least float32."""
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.where(jnp.isinf(x), jnp.zeros_like(x), x)


def no_range(shape: tuple[int, ...] = ()) -> Range:
    """The range before any observation: empty, since its end is below its start."""
    return jnp.ones(shape, jnp.float32), -jnp.ones(shape, jnp.float32)


def or_nan(lo: jax.Array, hi: jax.Array) -> Range:
    """The range, with NaN where it is empty, so that results of a compiled program are NaN too."""
    return jnp.where(lo <= hi, lo, np.nan), jnp.where(lo <= hi, hi, np.nan)


class Extreme(NamedTuple):
    """A reduction: of ``prepare(x)``, by ``pair`` of two elements, ``reduce`` of an array."""

    prepare: Callable[[jax.Array], jax.Array]
    pair: Callable[[jax.Array, jax.Array], jax.Array]
    reduce: Callable[..., jax.Array]

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The reduction of each block, 0 included."""
        return self.reduce(self.prepare(x), axis=axes, keepdims=True, initial=0)


_ABSMAX = Extreme(jnp.abs, jnp.maximum, jnp.max)
_MIN = Extreme(lambda x: x, jnp.minimum, jnp.min)
_MAX = Extreme(lambda x: x, jnp.maximum, jnp.max)


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


def _minmax(x: jax.Array, axes: Axes) -> Range:
    lo, hi = _extremes(x, axes, _MIN, _MAX)
    return lo, hi


@dataclasses.dataclass(frozen=True)
class Observer:
    """A range calibrator; see the module's docstring for the protocol."""

    clips: ClassVar[bool] = True
    """Whether elements of the observed array may lie outside the range."""

    all_codes: ClassVar[bool] = False
    """Whether ranges are for all codes of a type: for those of a signed type, specs keep its lowest code by default."""

    def init(self, shape: tuple[int, ...]) -> Any:
        """State before any data, for ranges of the given shape."""
        raise NotImplementedError

    def update(self, state: Any, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> Any:
        """State after ``x``, or after its elements that count."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """State after the batches of ``a`` and then those of ``b``, as from several hosts."""
        raise NotImplementedError

    def result(self, state: Any, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        """The range ``(lo, hi)``, with ``lo <= 0 <= hi``."""
        raise NotImplementedError

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        """The range of one array; `update` and `result` on it unless there is a more exact way."""
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        return self.result(self.update(self.init(shape), x, axes), symmetric=symmetric, roundtrip=roundtrip)


@dataclasses.dataclass(frozen=True)
class AbsMax(Observer):
    """``(-max|x|, max|x|)``: nothing is clipped."""

    clips: ClassVar[bool] = False

    def init(self, shape):
        return {"absmax": jnp.zeros(shape, jnp.float32)}

    def update(self, state, x, axes, counted=None):
        absmax = absmax_over(_only(x, counted), axes).astype(jnp.float32)
        return {"absmax": jnp.maximum(state["absmax"], absmax)}

    def merge(self, a, b):
        return {"absmax": jnp.maximum(a["absmax"], b["absmax"])}

    def result(self, state, *, symmetric, roundtrip):
        del symmetric, roundtrip
        return -state["absmax"], state["absmax"]

    def range(self, x, axes, *, symmetric, roundtrip):
        del symmetric, roundtrip
        absmax = absmax_over(x, axes)
        return -absmax, absmax


@dataclasses.dataclass(frozen=True)
class AbsMean(Observer):
    """``(-mean|x|, mean|x|)``: with codes -1, 0 and 1 the weights of BitNet b1.58, with two codes those of XNOR-Net.

    There ``q = clip(round(x / mean|x|), -1, 1)``; see `jaxquant.recipes.ternary` and `jaxquant.recipes.binary`. The
    gradient passes all values, as published: those beyond the mean, two in five, would never train otherwise.

    Source: Ma et al. 2024 (arXiv:2402.17764), equations 1 to 3; Rastegari et al. 2016 (arXiv:1603.05279), equation 6.
    """

    clips: ClassVar[bool] = False  # it has a mean, and gradients beyond it

    def init(self, shape):
        return {"sum": jnp.zeros(shape, jnp.float32), "count": jnp.zeros(shape, jnp.float32)}

    def update(self, state, x, axes, counted=None):
        x = _finite_or_nan(_only(lax.stop_gradient(x), counted))
        ones = jnp.ones(x.shape, jnp.float32) if counted is None else jnp.broadcast_to(counted, x.shape)
        sums = jnp.sum(jnp.abs(x), axis=axes, keepdims=True), jnp.sum(ones, axis=axes, keepdims=True)
        return self.merge(state, {"sum": sums[0].astype(jnp.float32), "count": sums[1].astype(jnp.float32)})

    def merge(self, a, b):
        return jax.tree.map(jnp.add, a, b)

    def result(self, state, *, symmetric, roundtrip):
        del symmetric, roundtrip
        mean = state["sum"] / jnp.maximum(state["count"], 1)
        return -mean, mean

    def range(self, x, axes, *, symmetric, roundtrip):
        del symmetric, roundtrip
        mean = jnp.mean(jnp.abs(_finite_or_nan(lax.stop_gradient(x))), axis=axes, keepdims=True)
        return -mean, mean


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """``(min(x, 0), max(x, 0))``: nothing is clipped."""

    clips: ClassVar[bool] = False

    def init(self, shape):
        return {"lo": jnp.zeros(shape, jnp.float32), "hi": jnp.zeros(shape, jnp.float32)}

    def update(self, state, x, axes, counted=None):
        lo, hi = (b.astype(jnp.float32) for b in _minmax(_only(x, counted), axes))
        return {"lo": jnp.minimum(state["lo"], lo), "hi": jnp.maximum(state["hi"], hi)}

    def merge(self, a, b):
        return {"lo": jnp.minimum(a["lo"], b["lo"]), "hi": jnp.maximum(a["hi"], b["hi"])}

    def result(self, state, *, symmetric, roundtrip):
        del symmetric, roundtrip
        return state["lo"], state["hi"]

    def range(self, x, axes, *, symmetric, roundtrip):
        del symmetric, roundtrip
        return _minmax(x, axes)


@dataclasses.dataclass(frozen=True)
class WholeRange(MinMax):
    """``(min(x, 0), max(x, 0))`` of a grid from -qmax - 1 to qmax, whose ends are half a step beyond the last codes.

    A block that has an end on a code instead, and all else on codes too (weights that were quantized before, three
    values, one), would not come out as it went in. Where an end on a code has less than a quarter of the error, the
    range is that much wider. Over batches it is not: a range has no blocks to look at. The default of whole grids.
    """

    qmax: float = 7

    def range(self, x, axes, *, symmetric, roundtrip):
        lo, hi = _minmax(x, axes)
        wider = lo * ((self.qmax + 1.5) / (self.qmax + 1)), hi * ((self.qmax + 0.5) / self.qmax)
        finite = _finite_or_nan(x)
        largest = jnp.maximum(-lo, hi)
        unit = jnp.where(largest > 0, largest, 1)

        def error(lo: jax.Array, hi: jax.Array) -> jax.Array:
            return jnp.sum(((roundtrip(finite, lo, hi) - finite) / unit) ** 2, axis=axes, keepdims=True)

        on_codes = 4 * error(*wider) < error(lo, hi)
        return jnp.where(on_codes, wider[0], lo), jnp.where(on_codes, wider[1], hi)


@dataclasses.dataclass(frozen=True)
class EMA(Observer):
    """Exponential moving average of each batch's min and max, corrected for the zero start.

    After n batches ``lo = sum_i (1 - decay) decay^(n-i) lo_i / (1 - decay^n)``: the correction of Adam (Kingma & Ba
    2015, section 3), so that one batch gives that batch's own range.
    """

    decay: float = 0.99
    clips: ClassVar[bool] = False  # of one array; across batches it may

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise quant_error("EMA", "decay must be in [0, 1)", todo="Use for example 0.99", decay=self.decay)

    def init(self, shape):
        return {
            "lo": jnp.zeros(shape, jnp.float32),
            "hi": jnp.zeros(shape, jnp.float32),
            "weight": jnp.zeros(shape, jnp.float32),
        }

    def update(self, state, x, axes, counted=None):
        lo, hi = (b.astype(jnp.float32) for b in _minmax(_only(x, counted), axes))
        seen = jnp.ones_like(lo) if x.size else jnp.zeros_like(lo)  # a batch without elements is none
        if counted is not None:
            seen = jnp.any(jnp.broadcast_to(counted, x.shape), axis=axes, keepdims=True).astype(jnp.float32)
        new = {"lo": lo, "hi": hi, "weight": seen}
        return self.merge(state, jax.tree.map(lambda now: (1 - self.decay) * now, new))

    def merge(self, a, b):
        # weight = 1 - decay^n after n batches, so what a has seen fades by decay^n = 1 - weight of b.
        return jax.tree.map(lambda old, new: old * (1 - b["weight"]) + new, a, b)

    def result(self, state, *, symmetric, roundtrip):
        del symmetric, roundtrip
        weight = jnp.maximum(state["weight"], jnp.finfo(jnp.float32).tiny)
        return state["lo"] / weight, state["hi"] / weight

    def range(self, x, axes, *, symmetric, roundtrip):
        del symmetric, roundtrip
        return _minmax(x, axes)  # the average of one batch


_BINS = 2048
_LIMB = 20  # bits of the lower half of a count


def _rows(x: jax.Array, axes: Axes) -> jax.Array:
    """The elements of each block in one last axis; the leading axes keep x's rank, with size 1 at ``axes``."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    order = tuple(i for i in range(x.ndim) if i not in axes) + tuple(axes)
    return jnp.transpose(x, order).reshape(*kept, math.prod(x.shape[i] for i in axes))


class _Limbs(NamedTuple):
    """Exact counts, ``high * 2**20 + low``, as int32."""

    low: jax.Array
    high: jax.Array

    @classmethod
    def of(cls, counts: jax.Array, rest: jax.Array) -> _Limbs:
        """From a float32 and its remainder."""
        high = jnp.floor(counts * 2.0**-_LIMB)
        return cls((counts - high * 2.0**_LIMB + rest).astype(jnp.int32), high.astype(jnp.int32)).carried()

    def carried(self) -> _Limbs:
        """The same with the lower half from 0 to 2**20."""
        return _Limbs(self.low & ((1 << _LIMB) - 1), self.high + (self.low >> _LIMB))

    def real(self) -> jax.Array:
        """The nearest float32, or its neighbour."""
        return self.high.astype(jnp.float32) * 2.0**_LIMB + self.low.astype(jnp.float32)

    def split(self) -> dict[str, jax.Array]:
        """Inverse of `of`."""
        counts = self.real()
        near = _Limbs.of(counts, jnp.zeros_like(counts))
        rest = (self.high - near.high) * (1 << _LIMB) + (self.low - near.low)
        return {"counts": counts, "rest": rest.astype(jnp.float32)}

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> _Limbs:
        """``fn`` of both halves."""
        return _Limbs(fn(self.low), fn(self.high))

    def flipped(self) -> _Limbs:
        """Bins from the last to the first."""
        return self.map(lambda half: jnp.flip(half, -1))

    def __add__(self, other: Any) -> _Limbs:
        return _Limbs(self.low + other.low, self.high + other.high).carried()


@dataclasses.dataclass(frozen=True)
class _Histogram(Observer):
    """Calibrators whose state is a histogram of each block: 2048 equal bins on ``[-span, span)``.

    Spans are powers of two, the least above the absmax, so that a wider batch doubles the span and merges bins in
    pairs: the state never grows and no element is lost, in whatever order batches are merged. A float32 that counts by
    ones stops at 2**24, and an int32 turns negative at 2**31: a count is the nearest float32 (``counts``) and what that
    lacks (``rest``), together exact up to 2**50 elements.
    """

    def init(self, shape):
        bins = (*shape, _BINS)
        return {
            "span": jnp.zeros(shape, jnp.float32),
            "counts": jnp.zeros(bins, jnp.float32),
            "rest": jnp.zeros(bins, jnp.float32),
        }

    def update(self, state, x, axes, counted=None):
        x = _finite_or_nan(_only(x, counted))
        absmax = absmax_over(x, axes).astype(jnp.float32)
        least = jnp.maximum(exponent(absmax), -126)
        span = times_power_of_two(power_of_two(least), jnp.ones_like(least))
        span = jnp.where(absmax > 0, span, absmax)  # 0 stays 0, NaN stays NaN
        width = jnp.where(span > 0, span, 1)[..., None] / (_BINS // 2)
        found = jnp.floor(_rows(x, axes) / width).astype(jnp.int32) + _BINS // 2
        found = jnp.clip(found, 0, _BINS - 1)
        every = jnp.ones(found.shape, jnp.uint32)
        if counted is not None:
            every = _rows(jnp.broadcast_to(counted, x.shape), axes).astype(jnp.uint32)
        count = _scatter(found, every)  # of one array: less than 2**32
        limbs = _Limbs(count & ((1 << _LIMB) - 1), count >> _LIMB).map(lambda half: half.astype(jnp.int32))
        return self.merge(state, {"span": span, **limbs.split()})

    def merge(self, a, b):
        span = jnp.maximum(a["span"], b["span"])

        def widened(state: Any) -> _Limbs:
            doublings = jnp.clip(exponent(span) - exponent(state["span"]), 0, 31)
            position = jnp.arange(_BINS, dtype=jnp.int32) - _BINS // 2
            position = position.reshape((1,) * span.ndim + (-1,)) >> doublings[..., None]
            # 1024 lower halves in one bin stay below 2**30.
            return self._limbs(state).map(lambda half: _scatter(position + _BINS // 2, half))

        return {"span": span, **(widened(a) + widened(b)).split()}

    def _limbs(self, state) -> _Limbs:
        return _Limbs.of(state["counts"], state["rest"])

    def _centers(self, state) -> jax.Array:
        offset = (jnp.arange(_BINS, dtype=jnp.float32) - (_BINS // 2 - 0.5)) / (_BINS // 2)
        return state["span"][..., None] * offset.reshape((1,) * state["span"].ndim + (-1,))

    def _shares(self, state) -> jax.Array:
        """The part of all elements that is in each bin."""
        return state["counts"] / jnp.maximum(jnp.sum(state["counts"], -1, keepdims=True), 1)

    def _minmax(self, state) -> Range:
        """Outer edges of the occupied bins."""
        edges = self._centers(state)
        half = state["span"][..., None] / _BINS
        seen = state["counts"] > 0
        lo = jnp.min(jnp.where(seen, edges - half, 0), axis=-1)
        hi = jnp.max(jnp.where(seen, edges + half, 0), axis=-1)
        nan = jnp.where(jnp.isnan(state["span"]), state["span"], 0)  # which min and max may drop
        return jnp.minimum(lo, 0) + nan, jnp.maximum(hi, 0) + nan


def _scatter(index: jax.Array, weights: jax.Array) -> jax.Array:
    """Histogram along the last axis: weights added at index, leading axes kept."""
    flat_index, flat_weights = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (index, weights))
    flat_index = jnp.broadcast_to(flat_index, flat_weights.shape)
    rows = jax.vmap(lambda i, w: jnp.zeros(_BINS, w.dtype).at[i].add(w))(flat_index, flat_weights)
    return rows.reshape(*weights.shape[:-1], _BINS)


def _quantile(rows: jax.Array, q: float) -> jax.Array:
    """The quantile of each row, interpolated between two neighbours; NaN if there is a NaN.

    Which two is computed while tracing: in float32 the place of a quantile among 2**24 elements is not exact.
    """
    ordered, place = jnp.sort(rows, axis=-1), q * (rows.shape[-1] - 1)
    below = min(max(math.floor(place), 0), rows.shape[-1] - 1)
    left, right = ordered[..., below], ordered[..., min(below + 1, rows.shape[-1] - 1)]
    value = left * (1 - (place - below)) + right * (place - below)
    return jnp.where(jnp.isnan(ordered[..., -1]), jnp.nan, value)  # NaN is sorted to the end


@dataclasses.dataclass(frozen=True)
class Percentile(_Histogram):
    """The range that holds the central ``p`` percent: of ``|x|`` if symmetric, on each side if not.

    One array is sorted exactly; over batches the answer is within one bin (1/1024 of the span, which is
    less than twice the largest magnitude).
    """

    p: float = 99.9

    def __post_init__(self):
        if not 50 < self.p <= 100:
            raise quant_error("Percentile", "p must be in (50, 100]", todo="Use for example 99.9", p=self.p)

    def range(self, x, axes, *, symmetric, roundtrip):
        del roundtrip
        rows = _rows(_finite_or_nan(x), axes)
        if symmetric:
            hi = _quantile(jnp.abs(rows), self.p / 100)
            return -hi, hi
        lo, hi = (_quantile(rows, q) for q in ((100 - self.p) / 100, self.p / 100))
        return jnp.minimum(lo, 0), jnp.maximum(hi, 0)

    def result(self, state, *, symmetric, roundtrip):
        del roundtrip
        middle, width = _BINS // 2, state["span"] / (_BINS // 2)
        limbs = self._limbs(state)

        def bins_inside(limbs: _Limbs) -> jax.Array:
            """How many bins, from the first on, leave at most 1 - p of the mass after them (small masses are exact)."""
            sums = limbs.flipped().map(lambda half: lax.cumsum(half, half.ndim - 1))  # 2048 halves: less than 2**31
            rest = sums.carried().flipped().real()
            return jnp.maximum(jnp.sum(rest > (100 - self.p) / 100 * rest[..., :1], -1), 1)

        if symmetric:
            both = limbs.map(lambda half: half[..., middle:]) + limbs.flipped().map(lambda half: half[..., middle:])
            hi = bins_inside(both).astype(jnp.float32) * width
            return -hi, hi
        hi = (bins_inside(limbs) - middle).astype(jnp.float32) * width
        lo = (middle - bins_inside(limbs.flipped())).astype(jnp.float32) * width
        return jnp.minimum(lo, 0), jnp.maximum(hi, 0)


_RATIOS = tuple(0.95**k for k in range(90))  # 1 down to 0.01
_REFINEMENTS = 8


def least_error(evaluate: Callable[[jax.Array, jax.Array], Range], lo: jax.Array, hi: jax.Array, both: bool) -> Range:
    """The clip of least squared error, per block.

    Args:
      evaluate: ``(lo, hi) -> (error, gain)``; gain is the least-squares factor ``<x, v> / <v, v>`` of the values v.
      lo, hi: the range that clips nothing.
      both: also search the two ends separately (asymmetric ranges).
    """

    def better(best, new_lo, new_hi):
        error, gain = evaluate(new_lo, new_hi)
        old_error, old_lo, old_hi, old_gain = best
        won = error < old_error
        return tuple(
            jnp.where(won, new, old)
            for new, old in zip((error, new_lo, new_hi, gain), (old_error, old_lo, old_hi, old_gain), strict=True)
        )

    ratios = jnp.asarray(_RATIOS, lo.dtype)
    # The full range is tried inside the loop too: compiled by itself, its sums could differ in the last bit.
    best = (jnp.full_like(lo, math.inf), lo, hi, jnp.ones_like(lo))
    best = lax.fori_loop(0, len(_RATIOS), lambda i, b: better(b, lo * ratios[i], hi * ratios[i]), best)
    if both:
        for end in (0, 1):
            start = best

            def one_end(i, b, start=start, end=end):
                return better(b, start[1] * (1 if end else ratios[i]), start[2] * (ratios[i] if end else 1))

            best = lax.fori_loop(1, len(_RATIOS), one_end, best)
    # Alternate: codes for the best scale, then the best scale for those codes. Neither step raises the error.
    best = lax.fori_loop(0, _REFINEMENTS, lambda _, b: better(b, b[1] * b[3], b[2] * b[3]), best)
    return best[1], best[2]


def _evaluator(x: jax.Array, weights: jax.Array | None, axes: Axes, unit: jax.Array, roundtrip: Roundtrip):
    """Squared error and least-squares gain, in units of each block's absmax so that nothing over- or underflows."""

    def evaluate(lo, hi):
        v = roundtrip(x, lo, hi) / unit
        xn = x / unit
        terms = ((xn - v) ** 2, xn * v, v * v)
        error, xv, vv = (jnp.sum(t if weights is None else t * weights, axis=axes, keepdims=True) for t in terms)
        return error, jnp.where(vv > 0, xv / jnp.where(vv > 0, vv, 1), 1)

    return evaluate


@dataclasses.dataclass(frozen=True)
class MSE(_Histogram):
    """The clip that minimises the squared error of the block.

    90 clips from the full range down to 1 percent of it (ratio 0.95), then alternating least squares between codes and
    scale; for asymmetric ranges each end is searched as well. With a symmetric signed type the whole
    two's-complement grid is used (``narrow_range`` defaults to False): on Gaussian weights its extra code takes the
    relative error at 2 bits from .437 to .392.

    Source: the grid search is common practice (for example Banner et al. 2019, arXiv:1810.05723); the refinement is
    Lloyd's algorithm (1982) restricted to a uniform grid.
    """

    all_codes: ClassVar[bool] = True

    def range(self, x, axes, *, symmetric, roundtrip):
        x = _finite_or_nan(x)
        absmax = absmax_over(x, axes)
        lo, hi = _minmax(x, axes)
        unit = jnp.where(absmax > 0, absmax, 1)
        return least_error(_evaluator(x, None, axes, unit, roundtrip), lo, hi, both=not symmetric)

    def result(self, state, *, symmetric, roundtrip):
        lo, hi = self._minmax(state)
        unit = jnp.where(state["span"] > 0, state["span"], 1)[..., None]
        evaluate = _evaluator(self._centers(state), self._shares(state), (-1,), unit, roundtrip)
        lo, hi = least_error(evaluate, lo[..., None], hi[..., None], both=not symmetric)
        return lo[..., 0], hi[..., 0]


@dataclasses.dataclass(frozen=True)
class Entropy(_Histogram):
    """The clip whose quantized distribution is closest to the observed one in Kullback-Leibler divergence.

    For each of 64 clips, P is the histogram with the counts outside moved to the edge bins, and Q spreads the mass of
    each code evenly over the occupied bins that map to it.

    Source: Migacz 2017, "8-bit inference with TensorRT", slides 32-38; we use bins of any number type instead of
    128 merged ones.
    """

    def result(self, state, *, symmetric, roundtrip):
        lo, hi = self._minmax(state)
        if symmetric:
            hi = jnp.maximum(-lo, hi)
            lo = -hi
        centers, counts = self._centers(state), self._shares(state)
        flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
        occupied = (counts > 0).astype(jnp.float32)

        def divergence(lo, hi):
            clipped = jnp.clip(centers, lo[..., None], hi[..., None])
            step = state["span"][..., None] / (_BINS // 2)
            inside = (centers > lo[..., None] - step) & (centers < hi[..., None] + step)
            edge_lo, edge_hi = jnp.argmax(inside, -1), _BINS - 1 - jnp.argmax(jnp.flip(inside, -1), -1)
            bins = jnp.arange(_BINS).reshape((1,) * edge_lo.ndim + (-1,))
            home = jnp.clip(bins, edge_lo[..., None], edge_hi[..., None])
            p = _scatter(home, counts)
            values = roundtrip(clipped, lo[..., None], hi[..., None])
            group = jnp.cumsum(jnp.diff(values, axis=-1, prepend=values[..., :1]) != 0, axis=-1).astype(jnp.int32)
            mass = _scatter(group, jnp.where(inside, counts, 0))
            here = jnp.where(inside, occupied, 0)
            cells = _scatter(group, here)
            mean = mass / jnp.maximum(cells, 1)
            q = jnp.take_along_axis(flat(mean), flat(group), axis=-1).reshape(counts.shape) * here
            p_total, q_total = (jnp.maximum(jnp.sum(a, -1, keepdims=True), 1e-30) for a in (p, q))
            p, q = p / p_total, q / q_total
            floor = 1e-9
            return jnp.sum(jnp.where(p > 0, p * (jnp.log(p + floor) - jnp.log(q + floor)), 0), -1)

        def step(i, best):
            error, best_lo, best_hi = best
            ratio = 1 - i.astype(jnp.float32) / 64 * 0.95
            new = divergence(lo * ratio, hi * ratio)
            won = new < error
            return jnp.where(won, new, error), jnp.where(won, lo * ratio, best_lo), jnp.where(won, hi * ratio, best_hi)

        start = (jnp.full(lo.shape, math.inf, jnp.float32), lo, hi)
        _, lo, hi = lax.fori_loop(0, 64, step, start)
        return lo, hi
