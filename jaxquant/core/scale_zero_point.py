"""From the range of a block to its scale and zero point.

    scale = (hi - lo) / (qmax - qmin)        zero_point = round(qmin - lo / scale)        asymmetric
    scale = max(|lo|, |hi|) / qmax           no zero point                                symmetric, narrow range
    scale = max(-lo / (1/2 - qmin), hi / (qmax + 1/2))                                    symmetric, whole range

Jacob et al. 2018 (arXiv:1712.05877), equations 1 and 12, with round half to even throughout.
"""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.arithmetic import divide, divide_twice, exponent, finfo, nan_where, power_of_two, promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor, Scale, flat, from_codes
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.specs import QuantSpec

__all__ = ["affine", "e4m3_scale_in", "largest_magnitude", "reach", "scale_zero_point"]


def _float_scale(absmax: jax.Array, qmax: float | jax.Array, dtype: DTypeLike, empty: float = 1.0) -> jax.Array:
    """``absmax / qmax`` in the scale's dtype, from the least number that is not taken for 0; 1 where absmax is 0.

    A grid without 0 has ``empty=0`` instead: the least number there, since no code stands for 0.

    In float16 that least number is subnormal. A step that coarse is rounded up, so that the codes reach absmax.
    """
    info = finfo(dtype)
    if float(finfo(absmax.dtype).max) < float(info.max):  # a float64 scale of a float32 array is computed in float32
        info = finfo(absmax.dtype)
    least = float(info.smallest_subnormal if np.dtype(dtype) == np.float16 else info.tiny)
    scale = jnp.clip(divide(absmax, qmax), least, float(info.max))
    if least < float(info.tiny):
        scale = jnp.where(scale < float(info.tiny), jnp.ceil(scale / least) * least, scale)
    scale = scale.astype(dtype)
    return jnp.where(
        absmax == 0,
        jnp.full_like(scale, max(empty, least)),
        nan_where(jnp.isnan(absmax), scale),
    )


def _e8m0_scale(absmax: jax.Array, largest_exponent: int) -> jax.Array:
    """The power of two of OCP MX v1.0, section 6.3: 2 ** (floor(log2(absmax)) - emax), as float8_e8m0fnu."""
    scale = power_of_two(jnp.clip(exponent(absmax) - largest_exponent, -126, 127))
    scale = jnp.where(absmax == 0, 1.0, scale)
    return nan_where(jnp.isnan(absmax), scale).astype(jnp.float8_e8m0fnu)


def _e4m3_scale(absmax: jax.Array, qmax: float, top: jax.Array | None) -> QTensor:
    """fp8 block scales and one float32 for the whole array; ``top``, by default the largest absmax, has scale 448."""
    largest = float(finfo(jnp.float8_e4m3fn).max)
    least = float(finfo(jnp.float8_e4m3fn).smallest_subnormal)
    top = jnp.max(absmax) if top is None else top
    top = nan_where(jnp.any(jnp.isnan(absmax)), top).reshape((1,) * absmax.ndim)  # max may drop NaN
    unit = _float_scale(top, qmax * largest, jnp.float32)
    unit = jnp.maximum(unit, float(finfo(np.float32).tiny) / least)  # so that no product is subnormal
    local = jnp.clip(divide_twice(absmax, qmax, unit), least, largest)
    local = jnp.where(absmax == 0, 1.0, local).astype(jnp.float8_e4m3fn)
    return QTensor(local, unit, None, qtype="float8_e4m3fn", dtype=jnp.float32)


def e4m3_scale_in(unit: jax.Array, absmax: jax.Array, qmax: float) -> QTensor:
    """fp8 block scales beside a given float32: of a block so small that its scale rounds to 0, all codes are 0."""
    local = jnp.minimum(divide_twice(absmax, qmax, unit.astype(absmax.dtype)), 448.0).astype(jnp.float8_e4m3fn)
    local = jnp.where(local == 0, jnp.asarray(0.125, local.dtype), local)
    return QTensor(local, unit.astype(jnp.float32), None, qtype="float8_e4m3fn", dtype=jnp.float32)


def _two_level_scale(absmax: jax.Array, qmax: float, top: jax.Array | None) -> QTensor:
    """Integers 1 .. 15 times one float32; ``top``, by default the largest absmax, gets 15."""
    levels = QTYPES["uint4"].qmax
    unit = _float_scale(largest_magnitude(absmax, None) if top is None else top, qmax * levels, jnp.float32)
    multiplier = jnp.rint(divide_twice(absmax.astype(jnp.float32), qmax, unit))
    multiplier = jnp.where(multiplier >= 1, jnp.minimum(multiplier, levels), 1.0).astype(jnp.uint8)
    return from_codes(multiplier, unit, None, qtype="uint4", dtype=jnp.float32)


def largest_magnitude(absmax: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """The largest value along axes, which keep size 1; NaN if there is a NaN."""
    nan = jnp.any(jnp.isnan(absmax), axis=axes, keepdims=True)  # max may drop it
    return nan_where(nan, jnp.max(absmax, axis=axes, keepdims=True)).astype(jnp.float32)


def reach(lo: jax.Array, hi: jax.Array, spec: QuantSpec) -> tuple[jax.Array, float]:
    """``(magnitude, steps)`` of a symmetric type: the scale that covers the range is magnitude / steps.

    A grid that is narrow, or no integers, ends at qmax. A whole one, of few codes, has a step for every two halves: the
    ends of the range lie half a step beyond the last codes, and are rounded by no more than other values are.
    Stochastic rounding would not be right in the mean there: then the ends lie on the last codes.
    """
    info = spec.type
    if not info.signed:
        return jnp.maximum(hi, 0), info.qmax
    if not spec.whole_range:
        return jnp.maximum(jnp.abs(lo), jnp.abs(hi)), info.qmax
    half = 0.0 if spec.rounding == "stochastic" else 0.5
    above, below = info.qmax + half, half - info.qmin
    least = float(finfo(lo.dtype).tiny)  # a product that is less is flushed to 0, which is no range
    below_zero = jnp.where(lo >= 0, 0, jnp.maximum(-lo * (above / below), least))
    return jnp.maximum(below_zero, jnp.maximum(hi, 0)), above


def affine(
    lo: jax.Array, hi: jax.Array, spec: QuantSpec, top: jax.Array | None = None
) -> tuple[Scale, jax.Array | None]:
    """`scale_zero_point` without the checks."""
    info, dtype = spec.type, np.dtype(spec.scale_dtype or np.float32)
    if spec.symmetric:
        absmax, steps = reach(lo, hi, spec)
        if spec.two_level:
            return _two_level_scale(absmax, steps, top), None
        if info.scale_format == "e8m0":
            return _e8m0_scale(absmax, int(np.floor(np.log2(info.qmax)))), None
        if info.scale_format == "e4m3":
            return _e4m3_scale(absmax, info.qmax, top), None
        return _float_scale(absmax, steps, dtype, 1.0 if info.has_zero else 0.0), None
    lo, hi = jnp.minimum(lo, 0), jnp.maximum(hi, 0)
    # Halves where hi - lo may overflow; not elsewhere, since the half of the smallest normal number is flushed to 0.
    half = jnp.where(jnp.maximum(hi, -lo) > 1, jnp.asarray(0.5, lo.dtype), jnp.asarray(1, lo.dtype))
    scale = _float_scale(hi * half - lo * half, (info.qmax - info.qmin) * half, dtype)
    zero_point = jnp.clip(jnp.rint(info.qmin - divide(lo, scale.astype(lo.dtype))), info.qmin, info.qmax)
    if spec.rounding == "stochastic":
        scale, zero_point = _both_ends_within(lo, hi, zero_point, spec)
    return scale, zero_point.astype(info.code_dtype)


def _both_ends_within(
    lo: jax.Array, hi: jax.Array, zero_point: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    """A scale and zero point with ``qmin <= lo / scale + zero_point`` and ``hi / scale + zero_point <= qmax``.

    Rounding the zero point moves one end beyond its code by up to half a step, where stochastic rounding is not right
    in the mean: a scale that is that much larger covers it.
    """
    info, dtype = spec.type, np.dtype(spec.scale_dtype or np.float32)
    negative, positive = (lo < 0).astype(lo.dtype), (hi > 0).astype(lo.dtype)
    zero_point = jnp.clip(zero_point, info.qmin + negative, info.qmax - positive)
    below, above = (jnp.maximum(n, 1) for n in (zero_point - info.qmin, info.qmax - zero_point))
    return _float_scale(jnp.maximum(divide(-lo, below), divide(hi, above)), 1.0, dtype), zero_point


def scale_zero_point(lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> tuple[Scale, jax.Array | None]:
    """Scale and zero point that make codes cover the range ``[lo, hi]``.

    Symmetric: no zero point, and ``scale = max(|lo|, |hi|) / qmax`` where the lowest code is left out
    (``narrow_range``, the default at 7 and 8 bits), so that the ends are exact. With the whole range, the default of
    fewer bits, ``scale = max(-lo / (1/2 - qmin), hi / (qmax + 1/2))``: at 4 bits ``-lo / 8.5`` or ``hi / 7.5``. Steps
    are smaller then, and still no element is off by more than half of one; with ``rounding="stochastic"`` the ends lie
    on the last codes, ``-lo / 8`` or ``hi / 7``. Asymmetric: the range is first widened to
    contain 0; ``scale = (hi - lo) / (qmax - qmin)`` and ``zero_point = round(qmin - lo / scale)``, so real 0.0 has a
    code of its own and is exact; with ``rounding="stochastic"`` the scale is as much larger as both ends need. An empty
    range (both 0) gives scale 1, or the least number for a type without a 0 (binary, quaternary, iq4_nl).

    Args:
      lo, hi: float arrays of one shape (or scalars), in the units of the array to be quantized.
      spec: the `QuantSpec`.

    Returns:
      ``(scale, zero_point)`` of that shape. The scale is float32 or ``spec.scale_dtype``; a power of two in
      float8_e8m0fnu for mxfp8 and mxfp4; for nvfp4 a QTensor of fp8 scales with one float32, or that float32 alone
      for the range of a whole array whose spec is static. The zero point has the integer dtype of the codes, or is
      None if ``spec.symmetric``.

    Raises:
      QuantError: if the shapes differ, a bound is NaN or infinite, or ``lo > hi`` (for concrete arrays).

    Gradient: flows through ``scale`` as written.

    Example:
      >>> import jaxquant as jq
      >>> scale, zero_point = jq.scale_zero_point(-1.0, 3.0, jq.QuantSpec("uint8", symmetric=False))
      >>> print(scale, zero_point)
      0.015686275 64

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3; OCP Microscaling Formats v1.0, section 6.3.
    """
    if not isinstance(spec, QuantSpec):
        todo = "Use for example QuantSpec('int8')"
        raise quant_error("scale_zero_point", "spec must be a QuantSpec", todo=todo, spec=spec)
    lo, hi = jnp.asarray(lo), jnp.asarray(hi)
    if lo.shape != hi.shape:
        todo = "Give one lo and one hi per block"
        raise quant_error("scale_zero_point", "lo and hi must have one shape", todo=todo, lo=lo.shape, hi=hi.shape)
    lo, hi = lo.astype(promoted(lo.dtype, jnp.float32)), hi.astype(promoted(hi.dtype, jnp.float32))
    if not any(isinstance(end, jax.core.Tracer) for end in (lo, hi)):
        if not (np.all(np.isfinite(lo)) and np.all(np.isfinite(hi))):  # NumPy: a trace in progress stays out of it
            todo = "Remove NaN and inf from the data first"
            raise quant_error("scale_zero_point", "the range must be finite", todo=todo, lo=lo, hi=hi)
        if np.any(np.asarray(lo) > np.asarray(hi)):
            raise quant_error("scale_zero_point", "lo must not exceed hi", todo="Swap them", lo=lo, hi=hi)
    scale, zero_point = affine(lo, hi, spec)
    if isinstance(scale, QTensor) and spec.static_unit and not lo.ndim:
        scale = flat(scale.scale).reshape(lo.shape)
    return scale, zero_point
