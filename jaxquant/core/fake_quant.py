"""`fake_quant`: quantize and dequantize in one step, with a straight-through gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxquant.core.affine import encode, prepare, values_with_scale
from jaxquant.core.arithmetic import divide, promoted
from jaxquant.core.blocks import BlockView
from jaxquant.core.derivatives import with_derivatives
from jaxquant.core.jitted import jitted
from jaxquant.core.qtensor import QTensor, Scale, scale_values
from jaxquant.core.specs import QuantSpec

__all__ = ["PACT", "PAPER", "STRAIGHT", "Slopes", "fake_quant", "fake_quant_given"]


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Which derivatives a given range has.

    Attributes:
      ends: whether values on an end of the range count as inside.
      rounding: whether the scale has a derivative inside the range: that of the rounding error.
      whole: whether a float zero point holds integers, and is used as those.
    """

    ends: bool = True
    rounding: bool = True
    whole: bool = False

    def used(self, zero_point: jax.Array | None, spec: QuantSpec) -> jax.Array | None:
        """The zero point as codes are made with it."""
        return zero_point.astype(spec.type.code_dtype) if self.whole and zero_point is not None else zero_point


STRAIGHT = Slopes()
"""Of a range that is given: what is on its ends passes."""
PAPER = Slopes(ends=False, whole=True)
"""As LSQ and LSQ+ are published."""
PACT = Slopes(ends=False, rounding=False, whole=True)
"""As PACT is published."""


@jitted(static_argnames=("spec", "axes"))
def _forward(
    x: jax.Array,
    scale: Scale | None,
    zero_point: jax.Array | None,
    key: jax.Array | None,
    *,
    spec: QuantSpec,
    axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(result, scale, zero point). Compiled in eager use too, or a calibrator's sums may differ in the last bit."""
    encoded = encode(x, spec, axes, scale, zero_point, key)
    return values_with_scale(encoded, x.shape, x.dtype), scale_values(encoded.scale), encoded.zero_point


@jitted(static_argnums=(0, 1))
def _computed(
    spec: QuantSpec, axes: tuple[int, ...], x: jax.Array, key: jax.Array | None, unit: Scale | None = None
) -> jax.Array:
    """`fake_quant` with a range that is computed of the array, or within a given unit, and counts as constant."""
    fixed, unit = lax.stop_gradient((x, unit))
    value, scale, zero_point = _forward(fixed, unit, None, key, spec=spec, axes=axes)
    if spec.never_clips:
        return with_derivatives(value, x)
    view = BlockView.of_scale(x.shape, scale.shape)
    inside = _inside(view, view.split(fixed), spec, scale, zero_point)
    # Keeps the mask alone for the backward pass.
    return with_derivatives(value, _again(functools.partial(_masked, view))(inside, x))


def _again(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, whose intermediate values the backward pass computes again."""
    return cast(Callable[..., jax.Array], jax.checkpoint(fn, prevent_cse=False))


def _masked(view: BlockView, inside: jax.Array, x: jax.Array) -> jax.Array:
    return view.join(jnp.where(inside, view.split(x), 0))


def _bounds(spec: QuantSpec, scale: jax.Array, zero_point: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest real value that has a code."""
    z = 0 if zero_point is None else zero_point.astype(scale.dtype)
    a, b = (spec.type.qmin - z) * scale, (spec.type.qmax - z) * scale
    return jnp.minimum(a, b), jnp.maximum(a, b)


def _inside(
    view: BlockView,
    x: jax.Array,
    spec: QuantSpec,
    scale: jax.Array,
    zero_point: jax.Array | None,
    *,
    ends: bool = True,
) -> jax.Array:
    """Where the elements of a viewed array lie in the range of their block, which no narrow dtype rounds."""
    wide = promoted(promoted(x.dtype, scale.dtype), jnp.float32)
    x, (lo, hi) = x.astype(wide), map(view.split_scale, _bounds(spec, scale.astype(wide), zero_point))
    return (x >= lo) & (x <= hi) if ends else (x > lo) & (x < hi)


@jitted(static_argnums=(0, 1, 2))
def _given(
    spec: QuantSpec,
    axes: tuple[int, ...],
    slopes: Slopes,
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    key: jax.Array | None,
) -> jax.Array:
    fixed = lax.stop_gradient((x, scale, zero_point))
    value, _, _ = _forward(*fixed[:2], slopes.used(fixed[2], spec), key, spec=spec, axes=axes)
    # Computed again in the backward pass, which is handed the arguments.
    differentiable = _again(functools.partial(_differentiable, spec, axes, slopes))
    return with_derivatives(value, differentiable(x, scale, zero_point, key))


def _differentiable(
    spec: QuantSpec,
    axes: tuple[int, ...],
    slopes: Slopes,
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    key: jax.Array | None,
) -> jax.Array:
    """An array with the derivatives of `_given`; rounding has derivative 1 in its argument, and no second one."""
    fixed = lax.stop_gradient((x, scale, zero_point))
    encoded = encode(fixed[0], spec, axes, fixed[1], slopes.used(fixed[2], spec), key)
    view = BlockView.of_scale(x.shape, scale.shape)
    xv, values = view.split(fixed[0].astype(encoded.values.dtype)), view.split(encoded.values)
    inside = _inside(view, xv, spec, *fixed[1:], ends=slopes.ends)
    s = view.split_scale(scale).astype(values.dtype)
    z = 0 if zero_point is None else view.split_scale(zero_point).astype(values.dtype)
    # Inside, d/ds [(round(x / s) + z - z) s] = q - z - x / s; outside, the code is constant: q - z.
    rounding = lax.stop_gradient(values - z - divide(xv, s)) if slopes.rounding else jnp.zeros_like(values)
    slope = jnp.where(inside, rounding, values - z)
    return view.join(jnp.where(inside, view.split(x).astype(values.dtype), 0) + slope * s).astype(x.dtype)


def fake_quant_given(
    spec: QuantSpec,
    axes: tuple[int, ...],
    slopes: Slopes,
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`fake_quant` with a given range, one entry per block, and the derivatives in ``slopes``."""
    return _given(spec, axes, slopes, x, scale, zero_point, key)


def fake_quant(
    x: ArrayLike | QTensor,
    spec: QuantSpec,
    *,
    reduce_axes: Sequence[int] | int,
    scale: ArrayLike | QTensor | None = None,
    zero_point: ArrayLike | None = None,
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
      ``zero_point``, 0 inside and ``-scale`` outside. Of every order and in both modes (`jax.jvp`, `jax.hessian`):
      rounding has derivative 1, which is constant.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity=jq.PerTensor())
      >>> f = lambda x: jq.fake_quant(x, spec, reduce_axes=(), scale=0.1).sum()
      >>> x = jnp.array([0.32, -0.08, 5.0])
      >>> jax.grad(f)(x)
      Array([1., 1., 0.], dtype=float32)

    Source: Bengio et al. 2013 (arXiv:1308.3432) for the straight-through estimator; Esser et al. 2020, LSQ
      (arXiv:1902.08153), equation 3, for the gradient of the scale, here without LSQ's gradient scale factor.
    """
    x, axes, scale, zero_point = prepare("fake_quant", x, spec, reduce_axes, scale, zero_point, key)
    if scale is None or spec.static_unit:
        return _computed(spec, axes, x, key, scale)
    return _given(spec, axes, STRAIGHT, x, scale_values(scale), zero_point, key)
