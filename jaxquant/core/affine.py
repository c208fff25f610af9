"""Affine quantization: from an array and a spec to codes, with the scale and the zero point of each block.

    q = clip(round(x / scale) + zero_point, qmin, qmax)

`jaxquant.core.scale_zero_point` has the scales. Jacob et al. 2018 (arXiv:1712.05877), equations 1 and 12, with round
half to even throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.arithmetic import divide, finfo, nan_where, times_reciprocal
from jaxquant.core.blocks import BlockView, block_shape, negative_axes, scale_shape
from jaxquant.core.codec import codes_of, round_to_grid
from jaxquant.core.errors import quant_error
from jaxquant.core.extremes import Range, absmax_over, array_absmax
from jaxquant.core.finite import has_nan, is_concrete
from jaxquant.core.jitted import jitted
from jaxquant.core.qtensor import QTensor, Scale, cast, flat, from_codes, scale_values
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.scale_zero_point import affine, e4m3_scale_in, largest_magnitude, reach
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree

__all__ = [
    "Encoded",
    "as_codes",
    "block_values",
    "codes_apart",
    "codes_in_parts",
    "encode",
    "minor_axes",
    "nearest",
    "observed_range",
    "prepare",
    "quantize",
    "quantized_by_itself",
    "roundtrip",
    "scaled_codes",
]


def _compute_dtype(x: jax.Array) -> type[jnp.floating]:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _saturated(scale: Scale, dtype: DTypeLike) -> bool:
    """Whether a concrete scale is the largest of its dtype because the range of the array's dtype exceeds it."""
    scale = scale.scale if isinstance(scale, QTensor) else scale
    largest = float(finfo(scale.dtype).max)
    if float(finfo(dtype).max) < 2 * largest or not is_concrete(scale):
        return False
    return bool(np.any(np.asarray(scale, np.float64) >= largest))


class Encoded(NamedTuple):
    """An array as grid values (floats, before they become codes), with their scales and zero points."""

    values: jax.Array
    scale: Scale
    zero_point: jax.Array | None


def _real(view: BlockView, value: jax.Array, dtype: DTypeLike) -> jax.Array:
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


@jitted(static_argnames="spec")
def observed_range(seen: PyTree, spec: QuantSpec) -> Range:
    """The range that a spec's observer finds in its state.

    It is a program of its own: a search in a loop would be compiled again at every call outside of `jax.jit`.
    """
    return spec.observer.result(seen, symmetric=spec.symmetric, roundtrip=roundtrip(spec))


def encode(
    x: jax.Array,
    spec: QuantSpec,
    axes: tuple[int, ...],
    scale: Scale | None = None,
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
        scale = e4m3_scale_in(flat(scale).reshape((1,) * x.ndim), absmax, spec.type.qmax)
    elif scale is None:
        clips = spec.observer.clips
        top = array_absmax(x) if spec.type.scale_format == "e4m3" and clips else None
        if spec.two_level and clips:
            top = absmax_over(x, axes)
        step = roundtrip(spec, top if top is None or top.ndim == 0 else view.split_reduced(top))
        lo, hi = spec.observer.range(xs, view.axes, symmetric=spec.symmetric, roundtrip=step)
        lo, hi = view.join_scale(lo), view.join_scale(hi)
        if spec.two_level and not clips:
            top = largest_magnitude(reach(lo, hi, spec)[0], axes)
        scale, zero_point = affine(lo, hi, spec, top)
    s = _real(view, scale_values(scale), dtype)
    z = None if zero_point is None else _real(view, zero_point, dtype)
    noise = None if key is None else jax.random.uniform(key, xv.shape, dtype)
    exact = noise is None and zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer)
    values = round_to_grid(_scaled(xv, s, z, spec, exact=exact), spec.type, noise)
    return Encoded(view.join(values), scale, zero_point)


def prepare(
    function: str,
    x: ArrayLike | QTensor,
    spec: QuantSpec,
    reduce_axes: Sequence[int] | int,
    scale: ArrayLike | QTensor | None,
    zero_point: ArrayLike | None,
    key: jax.Array | None,
) -> tuple[jax.Array, tuple[int, ...], Scale | None, jax.Array | None]:
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
    shape = (1,) * x.ndim if spec.static_unit else blocks
    if not isinstance(scale, QTensor) or scale.shape != shape:
        scale = _per_block(function, "scale", scale, shape)
    if zero_point is None or spec.static_unit:
        return x, axes, scale, None
    return x, axes, scale, _per_block(function, "zero_point", zero_point, blocks)


def _per_block(function: str, name: str, value: ArrayLike | QTensor, blocks: tuple[int, ...]) -> jax.Array:
    """A given scale or zero point with one entry per block; a scalar is repeated."""
    given = value if isinstance(value, QTensor) else jnp.asarray(value)
    if isinstance(given, QTensor) or given.shape not in ((), blocks):
        todo = f"Give one value per block, shape {blocks}, or a scalar"
        got: dict[str, Any] = {name: given}
        raise quant_error(function, f"{name} must have one entry per block", todo=todo, **got)
    return jnp.broadcast_to(given, blocks)


def as_codes(
    x: jax.Array,
    spec: QuantSpec,
    axes: tuple[int, ...],
    scale: Scale | None = None,
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
    found = encode(x, spec, axes, scale, zero_point, key)
    if scale is not None and not (spec.static_unit or spec.type.has_nan):
        found = found._replace(scale=_nan_where(x, found.scale))
    return _as_codes(x, found, key, spec, axes, apart=apart)


def _nan_where(x: jax.Array, scale: Scale) -> Scale:
    """A given scale, with NaN for each block that holds one, since no code stands for it."""
    if isinstance(scale, QTensor):
        return scale.replace(scale=_nan_where(x, scale.scale))
    view = BlockView.of_scale(x.shape, scale.shape)
    # A maximum of floats, which the TPU compiler finds in the pass that writes codes; any() takes it another one.
    nan = jnp.max(jnp.where(jnp.isnan(view.split(x)), 1.0, 0.0), axis=view.axes, keepdims=True, initial=0.0) > 0
    return nan_where(view.join_scale(nan), scale)


@Replaceable
def quantized_by_itself(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> QTensor:
    """`as_codes` of an array by its own range. A platform may replace it, to find range and codes in one pass."""
    return _as_codes(x, encode(x, spec, axes), None, spec, axes, apart=apart)


@Replaceable
def scaled_codes(x: jax.Array, times: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> QTensor:
    """`as_codes` of ``x times``, in the dtype of ``times``. A platform may replace it, to write no product of both."""
    return as_codes(x.astype(times.dtype) * times, spec, axes)


def _as_codes(
    x: jax.Array, found: Encoded, key: jax.Array | None, spec: QuantSpec, axes: tuple[int, ...], *, apart: bool
) -> QTensor:
    codes = codes_apart(x, found, key, spec=spec, axes=axes) if apart else codes_of(found.values, spec.type)
    return QTensor(codes, found.scale, found.zero_point, qtype=spec.qtype, dtype=x.dtype)


@Replaceable
def block_values(x: jax.Array, q: QTensor, *, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """The values, in x's dtype, of an array x whose codes ``q`` `as_codes` has found by x's own range.

    Scales that are powers of two keep them exact. A platform may replace it, to find values of x without codes.
    """
    del spec, axes
    return q.dequantize(x.dtype)


@Replaceable
def codes_apart(
    x: jax.Array, found: Encoded, key: jax.Array | None, *, spec: QuantSpec, axes: tuple[int, ...]
) -> jax.Array:
    """The codes of an array, from the grid values of `encode`."""
    del x, key, axes
    return codes_of(found.values, spec.type)


@jitted(static_argnames=("spec", "axes"))
def _quantize(
    x: jax.Array,
    scale: Scale | None,
    zero_point: jax.Array | None,
    key: jax.Array | None,
    *,
    spec: QuantSpec,
    axes: tuple[int, ...],
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
    x: ArrayLike | QTensor,
    spec: QuantSpec,
    *,
    reduce_axes: Sequence[int] | int,
    scale: ArrayLike | QTensor | None = None,
    zero_point: ArrayLike | None = None,
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
      QuantError: on NaN (in a concrete array; under ``jit``, a block with NaN gets scale NaN, also in place of a given
        one, so the NaN stays visible), integer input, an empty array, an axis out of range, a group size that does not
        divide, a scale that does not fit, or a range whose scale is too large for its dtype (float16 ends at 65504;
        under ``jit`` the values beyond saturate).

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
    if given and is_concrete(s := scale_values(scale)) and not np.all(np.isfinite(s) & (np.asarray(s) != 0)):
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


def values_with_scale(encoded: Encoded, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Real values of an `Encoded` array, rounded once to ``dtype``."""
    compute = encoded.values.dtype
    view = BlockView.of_scale(shape, tuple(encoded.scale.shape))
    values = view.split(encoded.values)
    if encoded.zero_point is not None:
        values = values - _real(view, encoded.zero_point, compute)
    return cast(view.join(values * _real(view, scale_values(encoded.scale), compute)), dtype)
