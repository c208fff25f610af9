"""Affine quantization: from an array and a spec to scale, zero point and codes.

    scale = (hi - lo) / (qmax - qmin)        zero_point = round(qmin - lo / scale)        asymmetric
    scale = max(|lo|, |hi|) / qmax           no zero point                                symmetric, narrow range
    scale = max(-lo / (1/2 - qmin), hi / (qmax + 1/2))                                    symmetric, whole range
    q = clip(round(x / scale) + zero_point, qmin, qmax)

Jacob et al. 2018 (arXiv:1712.05877), equations 1 and 12, with round half to even throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.arithmetic import divide, exponent, finfo, power_of_two, promoted, times_reciprocal
from jaxquant.core.blocks import BlockView, block_shape, negative_axes, scale_shape
from jaxquant.core.codec import codes_of, round_to_grid
from jaxquant.core.errors import quant_error
from jaxquant.core.extremes import absmax_over, array_absmax
from jaxquant.core.jitted import jitted
from jaxquant.core.qtensor import QTensor, cast, from_codes, scale_values
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.specs import QuantSpec

__all__ = [
    "Encoded",
    "affine",
    "as_codes",
    "codes_apart",
    "codes_in_parts",
    "encode",
    "has_nan",
    "minor_axes",
    "nearest",
    "not_finite",
    "prepare",
    "quantize",
    "quantized_by_itself",
    "reach",
    "roundtrip",
    "scale_zero_point",
]


def _compute_dtype(x: jax.Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _concrete(x: Any) -> bool:
    """Whether the values of an array can be read: it is not traced, and all of it is on this host."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _on_host(x: Any) -> bool:
    """Whether NumPy reads an array sooner than a program for its shape is compiled."""
    return x.size <= 1 << 16 and getattr(x, "is_fully_addressable", True)


def has_nan(x: Any) -> bool:
    """Whether a concrete array holds a NaN; False for a tracer, or an array on other hosts too."""
    if not _concrete(x):
        return False
    if _on_host(x):
        return bool(np.any(np.isnan(x)))
    with jax.ensure_compile_time_eval():  # a constant stays concrete during a trace
        return bool(_any_nan(x))


@jitted()
def _any_nan(x: Any) -> jax.Array:
    return jnp.any(jnp.isnan(x))


def not_finite(x: Any) -> int:
    """How many elements of a concrete array are NaN or infinite."""
    if _on_host(x):
        return int(np.count_nonzero(~np.isfinite(x)))
    with jax.ensure_compile_time_eval():
        return int(_not_finite(x))


@jitted()
def _not_finite(x: Any) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))


def _saturated(scale: Any, dtype: Any) -> bool:
    """Whether a concrete scale is the largest of its dtype because the range of the array's dtype exceeds it."""
    scale = scale.scale if isinstance(scale, QTensor) else scale
    largest = float(finfo(scale.dtype).max)
    if float(finfo(dtype).max) < 2 * largest or not _concrete(scale):
        return False
    return bool(np.any(np.asarray(scale, np.float64) >= largest))


# -- scale and zero point ---------------------------------------------------------------------------------------------


def _float_scale(absmax: jax.Array, qmax: float | jax.Array, dtype: Any, empty: float = 1.0) -> jax.Array:
    """``absmax / qmax`` in the scale's dtype, from the least number that is not taken for 0; 1 where absmax is 0.

    A grid without 0 has ``empty=0`` instead: the least number there, since no code stands for 0.

    In float16 that least number is subnormal. A step that coarse is rounded up, so that the codes reach absmax.
    """
    info = finfo(dtype)
    least = float(info.smallest_subnormal if np.dtype(dtype) == np.float16 else info.tiny)
    scale = jnp.clip(divide(absmax, qmax), least, float(info.max))
    if least < float(info.tiny):
        scale = jnp.where(scale < float(info.tiny), jnp.ceil(scale / least) * least, scale)
    scale = scale.astype(dtype)
    return jnp.where(
        absmax == 0,
        jnp.full_like(scale, max(empty, least)),
        jnp.where(jnp.isnan(absmax), np.asarray(np.nan, scale.dtype), scale),
    )


def _e8m0_scale(absmax: jax.Array, largest_exponent: int) -> jax.Array:
    """The power of two of OCP MX v1.0, section 6.3: 2 ** (floor(log2(absmax)) - emax), as float8_e8m0fnu."""
    scale = power_of_two(jnp.clip(exponent(absmax) - largest_exponent, -126, 127))
    scale = jnp.where(absmax == 0, 1.0, scale)
    return jnp.where(jnp.isnan(absmax), jnp.nan, scale).astype(jnp.float8_e8m0fnu)


def _e4m3_scale(absmax: jax.Array, qmax: float, top: jax.Array | None) -> QTensor:
    """fp8 block scales and one float32 for the whole array; ``top``, by default the largest absmax, has scale 448."""
    largest = float(finfo(jnp.float8_e4m3fn).max)
    least = float(finfo(jnp.float8_e4m3fn).smallest_subnormal)
    top = jnp.max(absmax) if top is None else top
    top = jnp.where(jnp.any(jnp.isnan(absmax)), jnp.nan, top).reshape((1,) * absmax.ndim)  # max may drop NaN
    unit = _float_scale(top, qmax * largest, jnp.float32)
    unit = jnp.maximum(unit, float(finfo(np.float32).tiny) / least)  # so that no product is subnormal
    local = jnp.clip(divide(divide(absmax, qmax), unit), least, largest)
    local = jnp.where(absmax == 0, 1.0, local).astype(jnp.float8_e4m3fn)
    return QTensor(local, unit, None, qtype="float8_e4m3fn", dtype=jnp.float32)


def _e4m3_scale_in(unit: jax.Array, absmax: jax.Array, qmax: float) -> QTensor:
    """fp8 block scales beside a given float32: of a block so small that its scale rounds to 0, all codes are 0."""
    local = jnp.minimum(divide(divide(absmax, qmax), unit.astype(absmax.dtype)), 448.0).astype(jnp.float8_e4m3fn)
    local = jnp.where(local == 0, jnp.asarray(0.125, local.dtype), local)
    return QTensor(local, unit.astype(jnp.float32), None, qtype="float8_e4m3fn", dtype=jnp.float32)


def _two_level_scale(absmax: jax.Array, qmax: float, top: jax.Array | None) -> QTensor:
    """Integers 1 .. 15 times one float32; ``top``, by default the largest absmax, gets 15."""
    levels = QTYPES["uint4"].qmax
    unit = _float_scale(_largest(absmax, None) if top is None else top, qmax * levels, jnp.float32)
    multiplier = jnp.rint(divide(divide(absmax.astype(jnp.float32), qmax), unit))
    multiplier = jnp.where(multiplier >= 1, jnp.minimum(multiplier, levels), 1.0).astype(jnp.uint8)
    return from_codes(multiplier, unit, None, qtype="uint4", dtype=jnp.float32)


def _largest(absmax: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """The largest value along axes, which keep size 1; NaN if there is a NaN."""
    nan = jnp.any(jnp.isnan(absmax), axis=axes, keepdims=True)  # max may drop it
    return jnp.where(nan, jnp.nan, jnp.max(absmax, axis=axes, keepdims=True)).astype(jnp.float32)


def reach(lo: jax.Array, hi: jax.Array, spec: QuantSpec) -> tuple[jax.Array, float]:
    """``(magnitude, steps)`` of a symmetric type: the scale that covers the range is magnitude / steps.

    A grid that is narrow, or no integers, ends at qmax. A whole one, of few codes, has a step for every two halves: the
    ends of the range lie half a step beyond the last codes, and are rounded by no more than other values are.
    """
    info = spec.type
    if not info.signed:
        return jnp.maximum(hi, 0), info.qmax
    if not spec.whole_range:
        return jnp.maximum(jnp.abs(lo), jnp.abs(hi)), info.qmax
    above, below = info.qmax + 0.5, 0.5 - info.qmin
    least = float(finfo(lo.dtype).tiny)  # a product that is less is flushed to 0, which is no range
    below_zero = jnp.where(lo >= 0, 0, jnp.maximum(-lo * (above / below), least))
    return jnp.maximum(below_zero, jnp.maximum(hi, 0)), above


def affine(lo: jax.Array, hi: jax.Array, spec: QuantSpec, top: jax.Array | None = None) -> tuple[Any, jax.Array | None]:
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
    return scale, zero_point.astype(info.code_dtype)


def scale_zero_point(lo: Any, hi: Any, spec: QuantSpec) -> tuple[Any, jax.Array | None]:
    """Scale and zero point that make codes cover the range ``[lo, hi]``.

    Symmetric: no zero point, and ``scale = max(|lo|, |hi|) / qmax`` where the lowest code is left out
    (``narrow_range``, the default at 7 and 8 bits), so that the ends are exact. With the whole range, the default of
    fewer bits, ``scale = max(-lo / (1/2 - qmin), hi / (qmax + 1/2))``: at 4 bits ``-lo / 8.5`` or ``hi / 7.5``. Steps
    are smaller then, and still no element is off by more than half of one. Asymmetric: the range is first widened to
    contain 0; ``scale = (hi - lo) / (qmax - qmin)`` and ``zero_point = round(qmin - lo / scale)``, so real 0.0 has a
    code of its own and is exact. An empty range (both 0) gives scale 1, or the
    least number for a type without a 0 (binary, quaternary, iq4_nl).

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
    return (scale.scale.reshape(lo.shape) if spec.static_unit and not lo.ndim else scale), zero_point


# -- codes ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """An array as grid values (floats, before they become codes), with their scales and zero points."""

    values: jax.Array
    scale: Any
    zero_point: jax.Array | None


def _real(view: BlockView, value: jax.Array, dtype: Any) -> jax.Array:
    return view.split_scale(value).astype(dtype)


def _scaled(x: jax.Array, s: jax.Array, z: jax.Array | None, spec: QuantSpec, *, exact: bool) -> jax.Array:
    """``x / s + z``, the number that is rounded to the grid.

    With ``exact``, for an integer ``z`` and rounding to nearest, ``x / s`` is rounded here, so that ties go to even
    multiples of the scale, with a zero point as without. Tables multiply by the reciprocal, as bitsandbytes does.
    """
    v = times_reciprocal(x, s) if spec.type.kind == "table" else divide(x, s)
    return v if z is None else (jnp.rint(v) if exact else v) + z


def nearest(x: jax.Array, s: jax.Array, z: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """The grid value nearest to ``x / s + z``, for a scale and an integer zero point (or None) in x's dtype."""
    return round_to_grid(_scaled(x, s, z, spec, exact=True), spec.type)


def roundtrip(spec: QuantSpec, top: jax.Array | None = None) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """``(x, lo, hi) -> x``, quantized and dequantized with that range; calibrators measure its error.

    ``top`` is the largest magnitude of the whole array, for formats with a scale for all of it; by default that of the
    ranges, which then depend on each other.
    """

    def there_and_back(values: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
        scale, zero_point = affine(lo, hi, spec, top)
        s = scale_values(scale).astype(values.dtype)
        z = None if zero_point is None else zero_point.astype(values.dtype)
        v = nearest(values, s, z, spec)
        return v * s if z is None else (v - z) * s

    return there_and_back


def encode(
    x: jax.Array,
    spec: QuantSpec,
    axes: tuple[int, ...],
    scale: Any = None,
    zero_point: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Encoded:
    """Grid values, scale and zero point of an array; everything in `quantize` before codes are made and packed."""
    dtype = _compute_dtype(x)
    view = BlockView(x.shape, block_shape(x.shape, spec.granularity, axes))
    xv = view.split(x.astype(dtype))
    xs = view.split(x)  # of x itself: a reduction of bfloat16 needs no copy in float32
    if scale is not None and spec.static_unit:
        absmax = view.join_scale(absmax_over(xs, view.axes))
        scale = _e4m3_scale_in(scale.reshape((1,) * x.ndim), absmax, spec.type.qmax)
    elif scale is None:
        clips = spec.observer.clips
        top = array_absmax(x) if spec.type.scale_format == "e4m3" and clips else None
        if spec.two_level and clips:
            top = absmax_over(x, axes)
        step = roundtrip(spec, top if top is None or top.ndim == 0 else view.split_reduced(top))
        lo, hi = spec.observer.range(xs, view.axes, symmetric=spec.symmetric, roundtrip=step)
        lo, hi = view.join_scale(lo), view.join_scale(hi)
        if spec.two_level and not clips:
            top = _largest(reach(lo, hi, spec)[0], axes)
        scale, zero_point = affine(lo, hi, spec, top)
    s = _real(view, scale_values(scale), dtype)
    z = None if zero_point is None else _real(view, zero_point, dtype)
    noise = None if key is None else jax.random.uniform(key, xv.shape, dtype)
    exact = noise is None and zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer)
    values = round_to_grid(_scaled(xv, s, z, spec, exact=exact), spec.type, noise)
    return Encoded(view.join(values), scale, zero_point)


def prepare(
    function: str,
    x: Any,
    spec: QuantSpec,
    reduce_axes: Sequence[int] | int,
    scale: Any,
    zero_point: Any,
    key: Any,
) -> tuple[jax.Array, tuple[int, ...], Any, Any]:
    """The checks shared by `quantize` and `fake_quant`: (x, negative axes, scale, zero point), broadcast to blocks."""
    if isinstance(x, QTensor):
        raise quant_error(function, "the array is quantized already", todo="Pass x.dequantize()", x=x)
    if not isinstance(spec, QuantSpec):
        raise quant_error(function, "spec must be a QuantSpec", todo="Use for example QuantSpec('int8')", spec=spec)
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise quant_error(function, "only arrays can be quantized", todo="Pass a float array", x=x) from None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        todo = "Cast it to a float dtype first, or leave it as it is"
        raise quant_error(function, "only float arrays can be quantized", todo=todo, dtype=x.dtype, shape=x.shape)
    if x.size == 0:
        raise quant_error(function, "the array is empty", todo="Leave it as it is", x=x)
    axes = negative_axes(reduce_axes, x.ndim, function=function, shape=x.shape)
    blocks = scale_shape(x.shape, block_shape(x.shape, spec.granularity, axes, function=function))
    if spec.rounding == "stochastic" and key is None:
        raise quant_error(function, "stochastic rounding needs a key", todo="Pass key=jax.random.key(...)", key=None)
    if spec.rounding == "nearest" and key is not None:
        todo = "Leave the key out, or use rounding='stochastic'"
        raise quant_error(function, "rounding to nearest uses no key", todo=todo, rounding=spec.rounding)
    if scale is None:
        if zero_point is not None:
            raise quant_error(function, "zero_point without scale", todo="Give both or neither", zero_point=zero_point)
        return x, axes, None, None
    if spec.symmetric != (zero_point is None):
        todo = "Give a zero_point with an asymmetric spec and none with a symmetric one"
        raise quant_error(function, "zero_point does not fit the spec", todo=todo, symmetric=spec.symmetric)
    if spec.static_unit:
        return x, axes, _per_block(function, "scale", scale, (1,) * x.ndim), None
    return x, axes, _per_block(function, "scale", scale, blocks), _per_block(function, "zero_point", zero_point, blocks)


def _per_block(function: str, name: str, value: Any, blocks: tuple[int, ...]) -> Any:
    """A given scale or zero point with one entry per block; a scalar is repeated."""
    if value is None or (isinstance(value, QTensor) and value.shape == blocks):
        return value
    value = value if isinstance(value, QTensor) else jnp.asarray(value)
    if isinstance(value, QTensor) or value.shape not in ((), blocks):
        todo = f"Give one value per block, shape {blocks}, or a scalar"
        got: dict[str, Any] = {name: value}
        raise quant_error(function, f"{name} must have one entry per block", todo=todo, **got)
    return jnp.broadcast_to(value, blocks)


def as_codes(
    x: jax.Array,
    spec: QuantSpec,
    axes: tuple[int, ...],
    scale: Any = None,
    zero_point: jax.Array | None = None,
    key: jax.Array | None = None,
    *,
    apart: bool = True,
) -> QTensor:
    """`encode`, as codes: one per element, in logical order.

    Args:
      x, spec, axes, scale, zero_point, key: as `encode`.
      apart: whether a compiler that would round as part of whatever follows, and lose by it, is to be kept from that.
    """
    if scale is None and key is None:
        return quantized_by_itself(x, spec=spec, axes=axes, apart=apart)
    return _as_codes(x, encode(x, spec, axes, scale, zero_point, key), key, spec, axes, apart=apart)


@Replaceable
def quantized_by_itself(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> QTensor:
    """`as_codes` of an array by its own range. A platform may replace it, to find range and codes in one pass."""
    return _as_codes(x, encode(x, spec, axes), None, spec, axes, apart=apart)


def _as_codes(
    x: jax.Array, found: Encoded, key: Any, spec: QuantSpec, axes: tuple[int, ...], *, apart: bool
) -> QTensor:
    codes = codes_apart(x, found, key, spec=spec, axes=axes) if apart else codes_of(found.values, spec.type)
    return QTensor(codes, found.scale, found.zero_point, qtype=spec.qtype, dtype=x.dtype)


@Replaceable
def codes_apart(x: jax.Array, found: Encoded, key: Any, *, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """The codes of an array, from the grid values of `encode`."""
    del x, key, axes
    return codes_of(found.values, spec.type)


@jitted(static_argnames=("spec", "axes"))
def _quantize(
    x: jax.Array, scale: Any, zero_point: Any, key: jax.Array | None, *, spec: QuantSpec, axes: tuple[int, ...]
) -> QTensor:
    x, minor = lax.stop_gradient(x), minor_axes(axes, x.ndim)
    # Codes are written transposed, or packed along their rows. Packing along another axis is fast as it is.
    apart = bool(minor) != spec.type.packed
    q = as_codes(x, spec, axes, scale, zero_point, key, apart=apart)
    q = from_codes(q.codes, q.scale, q.zero_point, qtype=q.qtype, dtype=q.dtype, minor=minor)
    if scale is not None or key is not None:
        return q
    return q.replace(codes=codes_in_parts(q, x, spec=spec, axes=axes))


@Replaceable
def codes_in_parts(q: QTensor, x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """The codes of an array in stored form. A platform may replace it, to write them a part at a time."""
    del x, spec, axes
    return q.codes


def minor_axes(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes to store last; () where they are last already."""
    return () if axes == tuple(range(-len(axes), 0)) or len(axes) == ndim else axes


def quantize(
    x: Any,
    spec: QuantSpec,
    *,
    reduce_axes: Sequence[int] | int,
    scale: Any = None,
    zero_point: Any = None,
    key: jax.Array | None = None,
) -> QTensor:
    """Quantizes a float array: ``q = clip(round(x / scale) + zero_point, qmin, qmax)``.

    Args:
      x: float array of any shape and float dtype; computed in float32 (float64 if it is float64).
      spec: number type, granularity and range choice.
      reduce_axes: the axes that share a scale: for a weight, the contracted ones. Ignored by ``per_tensor``.
      scale: use this instead of computing it: one entry per block (the array's rank), or a scalar.
      zero_point: goes with ``scale`` if the spec is asymmetric.
      key: a random key, for ``rounding="stochastic"`` only.

    Returns:
      A `QTensor` whose codes are stored with ``reduce_axes`` last. +-inf saturates and does not widen a range that is
      computed here.

    Raises:
      QuantError: on NaN (in a concrete array; under ``jit``, a block with NaN gets scale NaN, so the NaN stays
        visible), integer input, an empty array, an axis out of range, a group size that does not divide, a scale
        that does not fit, or a range whose scale is too large for its dtype (float16 ends at 65504; under ``jit`` the
        values beyond saturate).

    Gradient: none with respect to ``x`` (codes are integers); use `fake_quant` to train.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> w = jnp.array([[0.1, -2.0], [0.2, 4.0]])
      >>> q = jq.quantize(w, jq.QuantSpec("int8"), reduce_axes=(-2,))  # one scale per column
      >>> q.logical_codes()
      Array([[ 64, -64],
             [127, 127]], dtype=int8)

    Source: Jacob et al. 2018 (arXiv:1712.05877), equations 1 and 12.
    """
    x, axes, scale, zero_point = prepare("quantize", x, spec, reduce_axes, scale, zero_point, key)
    if x.ndim == 0 and spec.type.packed:
        todo = "Reshape it to (1,), or leave it as it is"
        raise quant_error("quantize", "packed codes need an axis to be packed along", todo=todo, x=x, qtype=spec.qtype)
    given = scale is not None
    if given and _concrete(s := scale_values(scale)) and not np.all(np.isfinite(s) & (np.asarray(s) != 0)):
        todo = "Compute it from finite data, or leave it out"
        raise quant_error("quantize", "the given scale must be finite and not 0", todo=todo, scale=scale)
    q = _quantize(x, scale, zero_point, key, spec=spec, axes=axes)
    if not given and _saturated(q.scale, x.dtype):
        todo = "Use a wider scale_dtype, or scale the array down"
        raise quant_error("quantize", "the range needs a scale that its dtype cannot hold", todo=todo, x=x, spec=spec)
    # A NaN in x makes a computed scale NaN, and scales are few.
    if has_nan(x if given else scale_values(q.scale) if isinstance(q.scale, QTensor) else q.scale):
        todo = "Find where it comes from; NaN has no code"
        raise quant_error("quantize", "NaN cannot be quantized", todo=todo, x=x)
    return q


def values_with_scale(encoded: Encoded, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Real values of an `Encoded` array, rounded once to ``dtype``."""
    compute = encoded.values.dtype
    view = BlockView.of_scale(shape, tuple(encoded.scale.shape))
    values = view.split(encoded.values)
    if encoded.zero_point is not None:
        values = values - _real(view, encoded.zero_point, compute)
    return cast(view.join(values * _real(view, scale_values(encoded.scale), compute)), dtype)
