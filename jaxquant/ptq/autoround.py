"""Learned rounding: signed gradients decide whether weights round up or down, and how far ranges are clipped."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import roundtrip
from jaxquant.core.arithmetic import nan_where
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.gram import WeightStats, damped, gram_of, normal
from jaxquant.ptq.layer import Layer, Steps

__all__ = ["autoround"]


def autoround(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    iterations: int = 200,
    learning_rate: float | None = None,
    damping: float = 0.01,
) -> QTensor:
    """Learns an offset in [-1/2, 1/2] for every weight before it is rounded, and a ratio for each end of every range.

    With ``lo, hi`` the range of a group, a and b in (0, 1] its learned ratios, and V the offsets,

        s, z = step of (a lo, b hi)        Q = s (clip(round(W / s + z + V)) - z)

    The error ``tr(E^T H E)`` of ``E = W - Q``, with H the damped Gram matrix of the inputs, is lowered by steps against
    the *sign* of its gradient, of a size that falls linearly to 0. The gradient passes straight through rounding. For
    each output the best iteration is kept, so that no output becomes worse than rounded to nearest.

    Args:
      w: float weight.
      spec: an integer type, per channel or per group; its calibration gives the ranges to start from.
      reduce_axes: the contracted axes.
      stats: of this weight, from `calibrate` with ``{"gram": Gram()}``.
      iterations: gradient steps; each costs a product with H.
      learning_rate: of the first step; None: 1 / iterations, with which an offset can go from 0 to 1/2.
      damping: added to the diagonal of H, in units of its mean.

    Returns:
      `QTensor` of w's shape.

    Raises:
      QuantError: as `quantize`; for other types and one scale per tensor; if the Gram matrix is missing, of another
        size, NaN or infinite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.autoround import autoround
      >>> from jaxquant.ptq.rtn import rtn
      >>> x = jax.random.normal(jax.random.key(0), (64, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
      >>> w, spec = jax.random.normal(jax.random.key(2), (16, 8)), jq.QuantSpec("int3")
      >>> stats = {"gram": {"gram": (x.T @ x)[None], "rows": jnp.float32(64)}}
      >>> error = lambda q: float(jnp.sum((x @ (w - q.dequantize())) ** 2))
      >>> q = autoround(w, spec, reduce_axes=(-2,), stats=stats)
      >>> error(q) < 0.5 * error(rtn(w, spec, reduce_axes=(-2,)))
      True

    Source: Cheng et al. 2023 (AutoRound, arXiv:2309.05516), which learns block by block on sampled inputs; this learns
    layer by layer on the Gram matrix of all inputs. The offsets are those of AdaRound (Nagel et al. 2020,
    arXiv:2004.10568). Scales stay positive.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise quant_error("autoround", "iterations must be positive", todo="Use 200", iterations=iterations)
    if not damping > 0:
        raise quant_error("autoround", "damping must be positive", todo="Use for example 0.01", damping=damping)
    layer, w = Layer.of("autoround", w, spec, reduce_axes)
    if layer.shared or spec.type.kind != "int":
        raise quant_error(
            "autoround",
            "needs an integer type with scales of their own",
            todo="Use an integer type per channel or per group, or descend, which takes every grid",
            qtype=spec.qtype,
            granularity=spec.granularity,
        )
    layer, gram = gram_of("autoround", stats, layer)
    rate = 1 / iterations if learning_rate is None else learning_rate
    return _autoround(w, gram, jnp.float32(rate), damping, layer=layer, iterations=iterations)


class _Learned(NamedTuple):
    """Offsets [groups, group, rows], and ratios of the ends of the ranges [groups, rows]."""

    offset: jax.Array
    low: jax.Array
    high: jax.Array


def _through(x: jax.Array, value: jax.Array) -> jax.Array:
    """``value`` with the gradient of x (straight through)."""
    return x + lax.stop_gradient(value - x)


@functools.partial(jax.jit, static_argnames=("layer", "iterations"))
def _autoround(
    w: jax.Array, gram: jax.Array, rate: float | jax.Array, damping: float | jax.Array, *, layer: Layer, iterations: int
) -> QTensor:
    spec, info = layer.spec, layer.spec.type

    def one(x: jax.Array, gram: jax.Array) -> tuple[jax.Array, Steps]:
        h, shape = damped(normal(gram, layer)[0], damping), x.shape
        x = x.reshape(-1, layer.group, x.shape[-1])
        lo, hi = (r[:, 0] for r in spec.observer.range(x, (1,), symmetric=spec.symmetric, roundtrip=roundtrip(spec)))

        def quantized(p: _Learned) -> tuple[jax.Array, Steps]:
            steps = Steps.of_range(lo * p.low, hi * p.high, spec)
            real = x / steps.scale[:, None] + p.offset  # the zero point is an integer: it commutes with rounding
            moved = _through(real, jnp.rint(real)) + steps.zero[:, None]
            return jnp.clip(moved, info.qmin, info.qmax), steps

        def loss(p: _Learned) -> tuple[jax.Array, jax.Array]:
            values, steps = quantized(p)
            error = (x - steps[:, None].real(values)).reshape(shape)
            each = jnp.sum(error * (h @ error), axis=0)
            return jnp.sum(each), each

        def step(i: jax.Array, state: tuple[_Learned, _Learned, jax.Array]) -> tuple[_Learned, _Learned, jax.Array]:
            p, best, least = state
            gradient, each = jax.grad(loss, has_aux=True)(p)
            won = each < least
            best = jax.tree.map(lambda new, old: jnp.where(won[(None,) * (new.ndim - 1)], new, old), p, best)
            size = rate * (1 - i / iterations)
            p = jax.tree.map(lambda v, g: v - size * jnp.sign(g), p, gradient)
            ratios = (jnp.clip(r, 0.05, 1) for r in (p.low, p.high))
            return _Learned(jnp.clip(p.offset, -0.5, 0.5), *ratios), best, jnp.where(won, each, least)

        start = _Learned(jnp.zeros_like(x), jnp.ones_like(lo), jnp.ones_like(hi))
        first = (start, start, jnp.full(shape[-1], jnp.inf, jnp.float32))
        _, best, _ = lax.fori_loop(0, iterations + 1, step, first)
        values, steps = quantized(best)
        return jnp.rint(values).reshape(shape), Steps(nan_where(jnp.isnan(h[0, 0]), steps.scale), steps.zero)

    with jax.default_matmul_precision("highest"):
        values, steps = layer.map(one, layer.split(w.astype(jnp.float32)), gram)
    return layer.qtensor(values, steps, w.dtype)
