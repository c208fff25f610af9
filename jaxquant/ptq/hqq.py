"""HQQ: half-quadratic quantization, the zero point of least absolute error; needs no data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import minor_axes, roundtrip
from jaxquant.core.arithmetic import divide
from jaxquant.core.codec import codes_of
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor, from_codes
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.gram import WeightStats
from jaxquant.ptq.layer import Layer, Steps, stored_scale

__all__ = ["hqq"]

_BETA = 10.0  # as in the reference, whose growth of beta has no effect


def hqq(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    zero: Literal["integer", "float"] = "integer",
    p: float = 0.7,
    iterations: int = 20,
) -> QTensor:
    """Finds the scale, or the float zero point, that minimises the weights' errors by a norm that discounts outliers.

    Minimises ``sum |W - Q|^p`` with p < 1 by half-quadratic splitting: with E the part of the error that is attributed
    to outliers,

        Q = (q - z) s        E = shrink(W - Q)        s = <W - E, q - z> / <q - z, q - z>

    where ``shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)`` and beta = 10. With a float zero point the scale
    stays that of the range, and the third step is ``z = mean(q - (W - E) / s)``. The iteration stops when the mean
    absolute error of all groups no longer falls.

    Args:
      w: float weight.
      spec: number type and granularity.
      reduce_axes: the contracted axes.
      stats: ignored.
      zero: ``"integer"``: zero points, if the spec has any, are those of the range, and the scale is solved for; a
        group keeps its scale if the new one would raise its error. ``"float"``: zero points are float32 and solved for,
        as in the reference, and ranges need not contain 0.
      p: the exponent, in (0, 1].
      iterations: the most iterations.

    Returns:
      `QTensor` of w's shape.

    Raises:
      QuantError: as `quantize`; for one scale per tensor and for nvfp4, whose scales depend on each other.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.hqq import hqq
      >>> from jaxquant.ptq.rtn import rtn
      >>> w = jax.random.t(jax.random.key(0), 4.0, (64, 8))
      >>> spec = jq.QuantSpec("int3", symmetric=False)
      >>> error = lambda q: float(jnp.mean(jnp.abs(w - q.dequantize())))
      >>> error(hqq(w, spec, reduce_axes=(-2,))) < error(rtn(w, spec, reduce_axes=(-2,)))
      True

    Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". With ``zero="float"``
    the codes equal those of the package hqq; solving for the scale, for types without float zero points, is an
    addition.
    """
    del stats
    if zero not in ("integer", "float"):
        raise quant_error("hqq", "unknown kind of zero point", todo="Use 'integer' or 'float'", zero=zero)
    if not 0 < p <= 1:
        raise quant_error("hqq", "p must be in (0, 1]", todo="Use 0.7", p=p)
    layer, w = Layer.of("hqq", w, spec, reduce_axes)
    if layer.shared:
        todo = "Use granularity=PerChannel() or PerGroup(64)"
        raise quant_error("hqq", "needs scales of their own", todo=todo, qtype=spec.qtype, granularity=spec.granularity)
    if spec.symmetric and zero == "float":
        todo = "Use symmetric=False, or leave zero out"
        raise quant_error("hqq", "a symmetric type has no zero point", todo=todo, zero=zero)
    return _hqq(w, layer=layer, zero=zero, p=float(p), iterations=iterations)


def _shrink(x: jax.Array, p: float) -> jax.Array:
    magnitude = jnp.abs(x)
    # 0 to a negative power is infinite, so the maximum below gives 0.
    return jnp.sign(x) * jnp.maximum(magnitude - magnitude ** (p - 1) / _BETA, 0)


def _until_it_stops_falling(
    step: Callable[[jax.Array], tuple[jax.Array, jax.Array]], start: jax.Array, iterations: int
) -> jax.Array:
    """Repeats ``x, error = step(x)`` while the error falls; returns the last x, even if its error did not fall."""

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, x, best, _ = state
        x, error = step(x)
        return i + 1, x, jnp.minimum(error, best), error < best

    def fell(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < iterations) & state[3]

    return lax.while_loop(fell, body, (jnp.int32(0), start, jnp.float32(jnp.inf), jnp.bool_(True)))[1]


@functools.partial(jax.jit, static_argnames=("layer", "zero", "p", "iterations"))
def _hqq(w: jax.Array, *, layer: Layer, zero: str, p: float, iterations: int) -> QTensor:
    spec, info = layer.spec, layer.spec.type
    x = layer.split(w.astype(jnp.float32)).reshape(layer.length // layer.group, layer.group, -1)
    lost = lambda e: jnp.sum(jnp.abs(e) ** p, axis=1)  # noqa: E731

    lo, hi = spec.observer.range(x, (1,), symmetric=spec.symmetric, roundtrip=roundtrip(spec))
    first = Steps.of_range(lo, hi, spec)

    if zero == "integer":

        def fit_scale(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            steps = Steps(s, first.zero)
            c = steps.round(x, spec) - first.zero
            error, cc = x - c * s, jnp.sum(c * c, 1, keepdims=True)
            new = jnp.sum((x - _shrink(error, p)) * c, 1, keepdims=True) / jnp.where(cc > 0, cc, 1)
            return jnp.where((cc > 0) & (new > 0), new, s), jnp.mean(jnp.abs(error))

        scale = _until_it_stops_falling(fit_scale, first.scale, iterations)
        found = Steps(scale.astype(stored_scale(spec)).astype(jnp.float32), first.zero)
        steps = _better(x, found, first, spec, lost)
        return layer.qtensor(steps.round(x, spec), steps[:, 0], w.dtype)

    top = info.qmax - info.qmin
    lo, hi = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)
    inverse = jnp.minimum(divide(jnp.full_like(lo, top), jnp.where(hi > lo, hi - lo, 1)), 2e4)

    def fit_zero(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = jnp.clip(jnp.rint(x * inverse + z), 0, top)
        error = x - divide(q - z, inverse)
        return jnp.mean(q - (x - _shrink(error, p)) * inverse, 1, keepdims=True), jnp.mean(jnp.abs(error))

    z = _until_it_stops_falling(fit_zero, -lo * inverse, iterations)
    q = jnp.clip(jnp.rint(x * inverse + z), 0, top) + info.qmin
    scale, zero_point = (layer.join_scale(s[:, 0]) for s in (divide(jnp.ones_like(inverse), inverse), z + info.qmin))
    scale = scale.astype(stored_scale(spec))
    codes, minor = codes_of(layer.join(q), info), minor_axes(layer.axes, len(layer.shape))
    return from_codes(codes, scale, zero_point, qtype=spec.qtype, dtype=w.dtype, minor=minor)


def _better(x: jax.Array, a: Steps, b: Steps, spec: QuantSpec, lost: Callable[[jax.Array], jax.Array]) -> Steps:
    """For each group, the steps with the lower error."""
    won = (lost(x - a.real(a.round(x, spec))) < lost(x - b.real(b.round(x, spec))))[:, None]
    return jax.tree.map(lambda new, old: jnp.where(won, new, old), a, b)
