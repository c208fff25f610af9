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
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core import histograms
from jaxquant.core.arithmetic import exponent, finfo, nan_where, power_of_two, sums
from jaxquant.core.errors import quant_error
from jaxquant.core.extremes import Axes, Range, absmax_over, finite_or_nan, minmax, only_counted
from jaxquant.core.histograms import BINS, Limbs, scatter
from jaxquant.core.least_error import Roundtrip, evaluator, least_error
from jaxquant.core.types import PyTree

__all__ = [
    "EMA",
    "MSE",
    "AbsMax",
    "AbsMean",
    "Bounded",
    "Entropy",
    "MinMax",
    "Observer",
    "Percentile",
    "RoundedUp",
]

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Observer:
    """A range calibrator; see the module's docstring for the protocol."""

    clips: ClassVar[bool] = True
    """Whether elements of the observed array may lie outside the range."""

    all_codes: ClassVar[bool] = False
    """Whether ranges are for all codes of a type: for those of a signed type, specs keep its lowest code by default."""

    def init(self, shape: tuple[int, ...]) -> PyTree:
        """State before any data, for ranges of the given shape."""
        raise NotImplementedError

    def update(self, state: PyTree, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> PyTree:
        """State after ``x``, or after its elements that count."""
        raise NotImplementedError

    def merge(self, a: PyTree, b: PyTree) -> PyTree:
        """State after the batches of ``a`` and then those of ``b``, as from several hosts."""
        raise NotImplementedError

    def result(self, state: PyTree, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
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

    def init(self, shape: tuple[int, ...]) -> State:
        return {"absmax": jnp.zeros(shape, jnp.float32)}

    def update(self, state: State, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
        absmax = absmax_over(only_counted(x, counted), axes).astype(jnp.float32)
        return {"absmax": jnp.maximum(state["absmax"], absmax)}

    def merge(self, a: State, b: State) -> State:
        return {"absmax": jnp.maximum(a["absmax"], b["absmax"])}

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        return -state["absmax"], state["absmax"]

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        absmax = absmax_over(x, axes)
        return -absmax, absmax


@dataclasses.dataclass(frozen=True)
class Bounded(AbsMax):
    """``(-m, m)`` with ``m = min(max(max|x|, least), most)``: larger magnitudes saturate.

    With ``most=1200`` the activations of FBGEMM's fp8 layers, whose setting is named ``activation_scale_ub``.

    Args:
      least: the least range, in the units of x; it keeps the scale of a token of tiny values from vanishing.
      most: the largest range, in the units of x; None: no bound.
    """

    least: float = 0.0
    most: float | None = None
    clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        most = math.inf if self.most is None else self.most
        if not 0 <= self.least < math.inf or not most > self.least:
            todo = "Use for example Bounded(most=1200.0)"
            rule = "bounds must be numbers with 0 <= least < most"
            raise quant_error("Bounded", rule, todo=todo, least=self.least, most=self.most)

    def _bounded(self, absmax: jax.Array) -> Range:
        bounded = jnp.clip(absmax, self.least, self.most)
        bounded = jnp.where(jnp.isnan(absmax), absmax, bounded)
        return -bounded, bounded

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        return self._bounded(super().result(state, symmetric=symmetric, roundtrip=roundtrip)[1])

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        return self._bounded(super().range(x, axes, symmetric=symmetric, roundtrip=roundtrip)[1])


@dataclasses.dataclass(frozen=True)
class RoundedUp(AbsMax):
    """``(-m, m)``, where m is the least ``unit * 2**k`` that is not below ``max|x|``: nothing is clipped.

    With the largest value of a type as unit (448 for float8_e4m3fn), every scale is a power of two: the ``ue8m0``
    scales of DeepSeek V3.1.

    Args:
      unit: a positive float32.
    """

    unit: float = 1.0

    def __post_init__(self) -> None:
        if not 2.0**-64 < self.unit < 2.0**64:
            raise quant_error("RoundedUp", "unit must be a positive number", todo="Use 448.0 for fp8", unit=self.unit)

    def _rounded(self, absmax: jax.Array) -> Range:
        below = self.unit * power_of_two(exponent(absmax / self.unit)).astype(absmax.dtype)
        up = jnp.minimum(jnp.where(below < absmax, 2 * below, below), float(finfo(jnp.float32).max))
        up = jnp.where(jnp.isnan(absmax), absmax, up)
        return -up, up

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        return self._rounded(super().result(state, symmetric=symmetric, roundtrip=roundtrip)[1])

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        return self._rounded(super().range(x, axes, symmetric=symmetric, roundtrip=roundtrip)[1])


@dataclasses.dataclass(frozen=True)
class AbsMean(Observer):
    """``(-mean|x|, mean|x|)``: with codes -1, 0 and 1 the weights of BitNet b1.58, with two codes those of XNOR-Net.

    There ``q = clip(round(x / mean|x|), -1, 1)``; see `jaxquant.recipes.ternary` and `jaxquant.recipes.binary`. The
    gradient passes all values, as published: those beyond the mean, two in five, would never train otherwise.

    Source: Ma et al. 2024 (arXiv:2402.17764), equations 1 to 3; Rastegari et al. 2016 (arXiv:1603.05279), equation 6.
    """

    clips: ClassVar[bool] = False  # it has a mean, and gradients beyond it

    def init(self, shape: tuple[int, ...]) -> State:
        return {"sum": jnp.zeros(shape, jnp.float32), "count": jnp.zeros(shape, jnp.float32)}

    def update(self, state: State, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
        x = finite_or_nan(only_counted(lax.stop_gradient(x), counted))
        ones = jnp.ones(x.shape, jnp.float32) if counted is None else jnp.broadcast_to(counted, x.shape)
        sums = jnp.sum(jnp.abs(x), axis=axes, keepdims=True), jnp.sum(ones, axis=axes, keepdims=True)
        return self.merge(state, {"sum": sums[0].astype(jnp.float32), "count": sums[1].astype(jnp.float32)})

    def merge(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        mean = state["sum"] / jnp.maximum(state["count"], 1)
        return -mean, mean

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        mean = jnp.mean(jnp.abs(finite_or_nan(lax.stop_gradient(x))), axis=axes, keepdims=True)
        return -mean, mean


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """``(min(x, 0), max(x, 0))``: nothing is clipped."""

    clips: ClassVar[bool] = False

    def init(self, shape: tuple[int, ...]) -> State:
        return {"lo": jnp.zeros(shape, jnp.float32), "hi": jnp.zeros(shape, jnp.float32)}

    def update(self, state: State, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
        lo, hi = (b.astype(jnp.float32) for b in minmax(only_counted(x, counted), axes))
        return {"lo": jnp.minimum(state["lo"], lo), "hi": jnp.maximum(state["hi"], hi)}

    def merge(self, a: State, b: State) -> State:
        return {"lo": jnp.minimum(a["lo"], b["lo"]), "hi": jnp.maximum(a["hi"], b["hi"])}

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        return state["lo"], state["hi"]

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        return minmax(x, axes)


@dataclasses.dataclass(frozen=True)
class WholeRange(MinMax):
    """``(min(x, 0), max(x, 0))`` of a grid from -qmax - 1 to qmax, whose ends are half a step beyond the last codes.

    A block that has an end on a code instead, and all else on codes too (weights that were quantized before, three
    values, one), would not come out as it went in. Where an end on a code has less than a quarter of the error, the
    range is that much wider. Over batches it is not: a range has no blocks to look at. The default of whole grids.
    """

    qmax: float = 7

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        lo, hi = minmax(x, axes)
        wider = lo * ((self.qmax + 1.5) / (self.qmax + 1)), hi * ((self.qmax + 0.5) / self.qmax)
        finite = finite_or_nan(lax.stop_gradient(x))
        largest = jnp.maximum(-lo, hi)
        unit = jnp.where(largest > 0, largest, 1)

        def error(lo: jax.Array, hi: jax.Array) -> jax.Array:
            return ((roundtrip(finite, lo, hi) - finite) / unit) ** 2

        of_wider, of_narrower = sums(error(*wider), error(lo, hi), axes=axes)
        on_codes = 4 * of_wider < of_narrower
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

    def init(self, shape: tuple[int, ...]) -> State:
        return {
            "lo": jnp.zeros(shape, jnp.float32),
            "hi": jnp.zeros(shape, jnp.float32),
            "weight": jnp.zeros(shape, jnp.float32),
        }

    def update(self, state: State, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
        lo, hi = (b.astype(jnp.float32) for b in minmax(only_counted(x, counted), axes))
        seen = jnp.ones_like(lo) if x.size else jnp.zeros_like(lo)  # a batch without elements is none
        if counted is not None:
            seen = jnp.any(jnp.broadcast_to(counted, x.shape), axis=axes, keepdims=True).astype(jnp.float32)
        new = {"lo": lo, "hi": hi, "weight": seen}
        return self.merge(state, {name: (1 - self.decay) * now for name, now in new.items()})

    def merge(self, a: State, b: State) -> State:
        # weight = 1 - decay^n after n batches, so what a has seen fades by decay^n = 1 - weight of b.
        return {name: a[name] * (1 - b["weight"]) + b[name] for name in a}

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        weight = jnp.maximum(state["weight"], float(finfo(jnp.float32).tiny))
        return state["lo"] / weight, state["hi"] / weight

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del symmetric, roundtrip
        return minmax(x, axes)  # the average of one batch


@dataclasses.dataclass(frozen=True)
class _Histogram(Observer):
    """Calibrators whose state is a histogram of each block, see `jaxquant.core.histograms`."""

    def init(self, shape: tuple[int, ...]) -> State:
        return histograms.empty(shape)

    def update(self, state: State, x: jax.Array, axes: Axes, counted: jax.Array | None = None) -> State:
        return histograms.merged(state, histograms.of(x, axes, counted))

    def merge(self, a: State, b: State) -> State:
        return histograms.merged(a, b)


def _quantile(rows: jax.Array, q: float) -> jax.Array:
    """The quantile of each row, interpolated between two neighbours; NaN if there is a NaN.

    Which two is computed while tracing: in float32 the place of a quantile among 2**24 elements is not exact.
    """
    ordered, place = jnp.sort(rows, axis=-1), q * (rows.shape[-1] - 1)
    below = min(max(math.floor(place), 0), rows.shape[-1] - 1)
    left, right = ordered[..., below], ordered[..., min(below + 1, rows.shape[-1] - 1)]
    value = left * (1 - (place - below)) + right * (place - below)
    return nan_where(jnp.isnan(ordered[..., -1]), value)  # NaN is sorted to the end


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

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del roundtrip
        rows = histograms.rows(finite_or_nan(x), axes)
        if symmetric:
            hi = _quantile(jnp.abs(rows), self.p / 100)
            return -hi, hi
        lo, hi = (_quantile(rows, q) for q in ((100 - self.p) / 100, self.p / 100))
        return jnp.minimum(lo, 0), jnp.maximum(hi, 0)

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        del roundtrip
        middle, width = BINS // 2, state["span"] / (BINS // 2)
        limbs = Limbs.of(state["counts"], state["rest"])

        def bins_inside(limbs: Limbs) -> jax.Array:
            """How many bins, from the first on, leave at most 1 - p of the mass after them (small masses are exact)."""
            sums = limbs.flipped().map(lambda half: lax.cumsum(half, half.ndim - 1))  # 2048 halves: less than 2**31
            rest = sums.carried().flipped().real()
            return jnp.maximum(jnp.sum(rest > (100 - self.p) / 100 * rest[..., :1], -1), 1)

        if symmetric:
            both = limbs.map(lambda half: half[..., middle:]).plus(limbs.flipped().map(lambda half: half[..., middle:]))
            hi = bins_inside(both).astype(jnp.float32) * width
            return -hi, hi
        hi = (bins_inside(limbs) - middle).astype(jnp.float32) * width
        lo = (middle - bins_inside(limbs.flipped())).astype(jnp.float32) * width
        return jnp.minimum(lo, 0), jnp.maximum(hi, 0)


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

    def range(self, x: jax.Array, axes: Axes, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        x = finite_or_nan(x)
        absmax = absmax_over(x, axes)
        lo, hi = minmax(x, axes)
        unit = jnp.where(absmax > 0, absmax, 1)
        return least_error(evaluator(x, None, axes, unit, roundtrip), lo, hi, both=not symmetric)

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        lo, hi = histograms.edges(state)
        unit = jnp.where(state["span"] > 0, state["span"], 1)[..., None]
        evaluate = evaluator(histograms.centers(state), histograms.shares(state), (-1,), unit, roundtrip)
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

    def result(self, state: State, *, symmetric: bool, roundtrip: Roundtrip) -> Range:
        lo, hi = histograms.edges(state)
        if symmetric:
            hi = jnp.maximum(-lo, hi)
            lo = -hi
        centers, counts = histograms.centers(state), histograms.shares(state)
        occupied = (counts > 0).astype(jnp.float32)

        def flat(a: jax.Array) -> jax.Array:
            return a.reshape(-1, a.shape[-1])

        def divergence(lo: jax.Array, hi: jax.Array) -> jax.Array:
            clipped = jnp.clip(centers, lo[..., None], hi[..., None])
            step = state["span"][..., None] / (BINS // 2)
            inside = (centers > lo[..., None] - step) & (centers < hi[..., None] + step)
            edge_lo, edge_hi = jnp.argmax(inside, -1), BINS - 1 - jnp.argmax(jnp.flip(inside, -1), -1)
            bins = jnp.arange(BINS).reshape((1,) * edge_lo.ndim + (-1,))
            home = jnp.clip(bins, edge_lo[..., None], edge_hi[..., None])
            p = scatter(home, counts)
            values = roundtrip(clipped, lo[..., None], hi[..., None])
            group = jnp.cumsum(jnp.diff(values, axis=-1, prepend=values[..., :1]) != 0, axis=-1).astype(jnp.int32)
            mass = scatter(group, jnp.where(inside, counts, 0))
            here = jnp.where(inside, occupied, 0)
            cells = scatter(group, here)
            mean = mass / jnp.maximum(cells, 1)
            q = jnp.take_along_axis(flat(mean), flat(group), axis=-1).reshape(counts.shape) * here
            p_total, q_total = (jnp.maximum(jnp.sum(a, -1, keepdims=True), 1e-30) for a in (p, q))
            p, q = p / p_total, q / q_total
            floor = 1e-9
            return jnp.sum(jnp.where(p > 0, p * (jnp.log(p + floor) - jnp.log(q + floor)), 0), -1)

        def step(i: jax.Array, best: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            error, best_lo, best_hi = best
            ratio = 1 - jnp.float32(i) / 64 * 0.95  # without jit, i is an int
            new = divergence(lo * ratio, hi * ratio)
            won = new < error
            return jnp.where(won, new, error), jnp.where(won, lo * ratio, best_lo), jnp.where(won, hi * ratio, best_hi)

        start = (jnp.full(lo.shape, math.inf, jnp.float32), lo, hi)
        _, lo, hi = cast(tuple[jax.Array, jax.Array, jax.Array], lax.fori_loop(0, 64, step, start))
        return lo, hi
