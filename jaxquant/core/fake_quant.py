"""`fake_quant`: quantize and dequantize in one step, with a straight-through gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.affine import encode, prepare, values_with_scale
from jaxquant.core.arithmetic import divide
from jaxquant.core.blocks import BlockView
from jaxquant.core.qtensor import scale_values
from jaxquant.core.specs import QuantSpec

__all__ = ["fake_quant", "never_clips"]


@functools.partial(jax.jit, static_argnames=("spec", "axes"), inline=True)
def _forward(x, scale, zero_point, key, *, spec, axes):
    """(result, scale, zero point). Compiled in eager use too, or a calibrator's sums may differ in the last bit."""
    encoded = encode(x, spec, axes, scale, zero_point, key)
    return values_with_scale(encoded, x.shape, x.dtype), scale_values(encoded.scale), encoded.zero_point


def never_clips(spec: QuantSpec) -> bool:
    """Whether a range computed from the array itself covers all of it, so that the mask is 1 everywhere."""
    covers = not spec.observer.clips and spec.type.scale_format is None and not spec.two_level
    return covers and (spec.type.signed or not spec.symmetric)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _computed(spec, axes, x, key):
    return _forward(x, None, None, key, spec=spec, axes=axes)[0]


def _computed_fwd(spec, axes, x, key):
    out, scale, zero_point = _forward(x, None, None, key, spec=spec, axes=axes)
    return out, None if never_clips(spec) else (x, scale, zero_point)


def _computed_bwd(spec, axes, residual, g):
    del axes
    if residual is None:
        return g, None
    x, scale, zero_point = residual
    lo, hi = _bounds(spec, scale, zero_point)
    view = BlockView.of_scale(x.shape, scale.shape)
    xv = view.split(x)
    inside = (xv >= view.split_scale(lo)) & (xv <= view.split_scale(hi))
    return view.join(jnp.where(inside, view.split(g), 0)), None


_computed.defvjp(_computed_fwd, _computed_bwd)


def _bounds(spec: QuantSpec, scale: jax.Array, zero_point: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest real value that has a code."""
    z = 0 if zero_point is None else zero_point.astype(scale.dtype)
    a, b = (spec.type.qmin - z) * scale, (spec.type.qmax - z) * scale
    return jnp.minimum(a, b), jnp.maximum(a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _given(spec, axes, x, scale, zero_point, key):
    return _forward(x, scale, zero_point, key, spec=spec, axes=axes)[0]


def _given_fwd(spec, axes, x, scale, zero_point, key):
    return _given(spec, axes, x, scale, zero_point, key), (x, scale, zero_point, key)


def _given_bwd(spec, axes, residual, g):
    x, scale, zero_point, key = residual
    view = BlockView.of_scale(x.shape, scale.shape)
    lo, hi = (view.split_scale(b) for b in _bounds(spec, scale, zero_point))
    encoded = encode(x, spec, axes, scale, zero_point, key)
    xv, gv, values = view.split(x.astype(encoded.values.dtype)), view.split(g), view.split(encoded.values)
    s = view.split_scale(scale).astype(values.dtype)
    z = 0 if zero_point is None else view.split_scale(zero_point).astype(values.dtype)
    inside = (xv >= lo) & (xv <= hi)
    dx = view.join(jnp.where(inside, gv, 0).astype(g.dtype))
    # Inside, d/ds [(round(x / s) + z - z) s] = q - z - x / s; outside, the code is constant: q - z.
    slope = values - z - jnp.where(inside, divide(xv, s), 0)
    ds = view.join_scale(jnp.sum(gv.astype(slope.dtype) * slope, axis=view.axes, keepdims=True)).astype(scale.dtype)
    dz = None
    if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.floating):
        outside = jnp.where(inside, 0, -s * gv.astype(s.dtype))
        dz = view.join_scale(jnp.sum(outside, axis=view.axes, keepdims=True)).astype(zero_point.dtype)
    return dx, ds, dz, None


_given.defvjp(_given_fwd, _given_bwd)


def fake_quant(
    x: Any,
    spec: QuantSpec,
    *,
    reduce_axes: Sequence[int] | int,
    scale: Any = None,
    zero_point: Any = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """``dequantize(quantize(x))`` in float, with a straight-through gradient: the building block of QAT.

    Args:
      x: float array.
      spec: number type, granularity and range choice.
      reduce_axes: the axes that share a scale.
      scale: use this instead of computing it; it then receives a gradient. One entry per block, or a scalar.
      zero_point: goes with ``scale`` if the spec is asymmetric. A float zero point receives a gradient too.
      key: a random key, for ``rounding="stochastic"`` only.

    Returns:
      Array of x's shape and dtype; bit for bit what ``dequantize(quantize(x, ...))`` gives. NaN stays NaN (its whole
      block, where the scale is computed from it).

    Raises:
      QuantError: as `quantize`, except for NaN.

    Gradient: with respect to ``x``, 1 where ``(qmin - zero_point) * scale <= x <= (qmax - zero_point) * scale`` and 0
      elsewhere; a range computed from ``x`` counts as constant, and where it clips nothing (absmax, minmax) the
      gradient is the identity and no residual is kept. With respect to a given ``scale``, per element,
      ``q - zero_point - x / scale`` inside and ``q - zero_point`` outside (learned step size). With respect to a float
      ``zero_point``, 0 inside and ``-scale`` outside.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity="per_tensor")
      >>> f = lambda x: jq.fake_quant(x, spec, reduce_axes=(), scale=0.1).sum()
      >>> x = jnp.array([0.32, -0.08, 5.0])
      >>> jax.grad(f)(x)
      Array([1., 1., 0.], dtype=float32)

    Source: Bengio et al. 2013 (arXiv:1308.3432) for the straight-through estimator; Esser et al. 2020, LSQ
      (arXiv:1902.08153), equation 3, for the gradient of the scale, here without LSQ's gradient scale factor.
    """
    x, axes, scale, zero_point = prepare("fake_quant", x, spec, reduce_axes, scale, zero_point, key)
    if scale is None:
        return _computed(spec, axes, x, key)
    return _given(spec, axes, x, scale_values(scale), zero_point, key)
