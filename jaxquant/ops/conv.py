"""`conv_general_dilated` with quantized operands."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.ops.formulation import digit_count, digits_of, overflow_limit
from jaxquant.ops.matrix import Axes, Matrix, matrix
from jaxquant.ops.operands import Operand, as_array, operand_specs, result_dtype

__all__ = ["conv_general_dilated"]


@dataclasses.dataclass(frozen=True)
class _Conv:
    """The static half of a `conv_general_dilated` call."""

    lhs: Operand
    rhs: Operand
    numbers: lax.ConvDimensionNumbers
    window: tuple[tuple[str, Any], ...]
    precision: Any
    dtype: Any

    def __call__(self, lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
        return lax.conv_general_dilated(lhs, rhs, dimension_numbers=self.numbers, **dict(self.window), **kwargs)

    @property
    def feature_groups(self) -> int:
        return dict(self.window)["feature_group_count"]


def _rows_first(how: _Conv, x: Any, side: Operand, static: Any, *, kernel: bool) -> Matrix | jax.Array:
    """An operand as [1, images or output features, everything else], if it is quantized."""
    value = side.quantized(x, static)
    if isinstance(value, jax.Array):
        return value
    spec = how.numbers.rhs_spec if kernel else how.numbers.lhs_spec
    rest = tuple(i for i in range(x.ndim) if i != spec[0])
    canonical = matrix(value, Axes((), (spec[0],), rest))
    if canonical is None or canonical.groups > 1 or not canonical.integer:
        return side.real(x, static)
    return canonical


def _restore(codes: jax.Array, shape: tuple[int, ...], first: int) -> jax.Array:
    """Undoes ``[1, first, rest]``."""
    rest = tuple(n for i, n in enumerate(shape) if i != first)
    return jnp.moveaxis(codes.reshape(shape[first], *rest), 0, first)


def _natural(x: Any, codes: jax.Array, shape: tuple[int, ...], first: int) -> jax.Array:
    """A kernel's codes in the layout that a convolution reads fast.

    XLA folds a transpose into the layout of the kernel, and then leaves the fast path; a gather it does not fold. Kernels
    that `quantize_params` made are stored in this order already and cost nothing here.
    """
    if not isinstance(x, QTensor) or not x.minor:
        return _restore(codes, shape, first)
    index = np.moveaxis(np.arange(math.prod(shape)).reshape(shape[first], *np.delete(shape, first)), 0, first)
    return jnp.take(codes.reshape(-1), index.reshape(-1), mode="clip").reshape(shape)


def _along(value: jax.Array, ndim: int, axis: int) -> jax.Array:
    """[1, n, 1] to rank ndim with n at axis."""
    return value.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _integer(how: _Conv, lhs: Matrix, rhs: Matrix, lshape: tuple[int, ...], kernel: jax.Array) -> jax.Array:
    """int8 convolution with exact zero-point corrections, scaled.

    Padding contributes real 0, that is nothing, to each of the four sums of (q_l - z_l)(q_r - z_r).
    """
    batch, out_batch = how.numbers.lhs_spec[0], how.numbers.out_spec[0]
    features, out_features = how.numbers.rhs_spec[0], how.numbers.out_spec[1]
    ndim, conv = len(lshape), functools.partial(how, preferred_element_type=jnp.int32)
    x = _restore(lhs.codes, lshape, batch)
    out = conv(x, kernel)
    lz = None if lhs.zero_point is None else _along(lhs.zero_point, ndim, out_batch)
    rz = None if rhs.zero_point is None else _along(rhs.zero_point, ndim, out_features)
    one_image = jnp.ones([1 if i == batch else n for i, n in enumerate(lshape)], jnp.int8)
    one_feature = jnp.ones([how.feature_groups if i == features else n for i, n in enumerate(kernel.shape)], jnp.int8)

    def all_features(sums: jax.Array) -> jax.Array:
        """One output channel per feature group to one per output feature."""
        each = kernel.shape[features] // how.feature_groups
        return sums if how.feature_groups == 1 else jnp.repeat(sums, each, axis=out_features)

    if rz is not None:
        out = out - rz * all_features(conv(x, one_feature))
    if lz is not None:
        out = out - lz * conv(one_image, kernel)
    if lz is not None and rz is not None:
        out = out + lz * rz * all_features(conv(one_image, one_feature))
    out = out.astype(jnp.float32)
    return out * _along(lhs.scale, ndim, out_batch) * _along(rhs.scale, ndim, out_features)


def _digits(how: _Conv, x: jax.Array, rhs: Matrix, kernel: jax.Array) -> jax.Array:
    """A float activation as int8 digits, stacked as further images of one int8 convolution."""
    batch, count = how.numbers.lhs_spec[0], digit_count(how.precision)
    digits, scale = digits_of(x, count, tuple(i for i in range(x.ndim) if i != batch))
    weights = jnp.concatenate([scale.reshape(1, -1, 1) * (1 / 254) ** i for i in range(count)], axis=1)
    stacked = jnp.concatenate(digits, axis=batch)
    order = (batch, *(i for i in range(x.ndim) if i != batch))
    codes = jnp.transpose(stacked, order).reshape(1, stacked.shape[batch], -1)
    out = _integer(how, Matrix(codes, weights, None, rhs.qtype), rhs, stacked.shape, kernel)
    axis = how.numbers.out_spec[0]
    split = out.reshape(*out.shape[:axis], count, x.shape[batch], *out.shape[axis + 1 :])
    return jnp.sum(split, axis=axis)


def _forward(how: _Conv, lhs: Any, rhs: Any, lhs_static: Any, rhs_static: Any) -> jax.Array:
    left = _rows_first(how, lhs, how.lhs, lhs_static, kernel=False)
    right = _rows_first(how, rhs, how.rhs, rhs_static, kernel=True)
    # A float kernel, batch groups, or a sum that could overflow: the float convolution.
    exact = (
        isinstance(right, Matrix)
        and dict(how.window)["batch_group_count"] == 1
        and right.codes.shape[2] <= overflow_limit(left.reach if isinstance(left, Matrix) else 127, right.reach)
    )
    if not exact or (not isinstance(left, Matrix) and left.dtype == jnp.float64):
        return _reference(how, lhs, rhs, lhs_static, rhs_static)
    kernel = _natural(rhs, right.codes, rhs.shape, how.numbers.rhs_spec[0])
    if isinstance(left, Matrix):
        return _integer(how, left, right, lhs.shape, kernel).astype(how.dtype)
    return lax.platform_dependent(
        cpu=lambda: _digits(how, left, right, kernel).astype(how.dtype),
        default=lambda: _reference(how, lhs, rhs, lhs_static, rhs_static),
    )


def _reference(how: _Conv, lhs: Any, rhs: Any, lhs_static: Any, rhs_static: Any) -> jax.Array:
    """The float convolution of the same values."""
    lhs, rhs = how.lhs.real(lhs, lhs_static), how.rhs.real(rhs, rhs_static)
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    return how(lhs.astype(dtype), rhs.astype(dtype), precision=how.precision).astype(how.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(how, lhs, rhs, lhs_static, rhs_static):
    return _forward(how, lhs, rhs, lhs_static, rhs_static)


def _conv_fwd(how, *operands):
    return _forward(how, *operands), operands


def _conv_bwd(how, operands, g):
    return jax.vjp(functools.partial(_reference, how), *operands)[1](g)


_conv.defvjp(_conv_fwd, _conv_bwd)
_conv_jit = jax.jit(_conv, static_argnums=0, inline=True)


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    *,
    spec: OpSpec | None = None,
    act_scale: Any = None,
    act_zero_point: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` whose operands may be quantized, or are quantized on the way.

    An int8 convolution with int32 accumulation where kernel scales are per output feature (or per tensor) and activation
    scales per image (or per tensor); weight-only with the activation as int8 digits, as in `dot_general`. Scales per
    group along the contraction, float number types, batch groups and sums that could overflow int32 take the float
    convolution of the dequantized operands.

    Args:
      lhs: the activation, a float array or a QTensor.
      rhs: the kernel, a float array or a QTensor.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count: as
        for `jax.lax.conv_general_dilated`.
      precision, preferred_element_type, spec, act_scale, act_zero_point: as for `dot_general`.

    Returns:
      Array, as `jax.lax.conv_general_dilated`.

    Raises:
      QuantError: as `dot_general`.

    Gradient: as `dot_general`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import ops, recipes
      >>> x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> ops.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout, spec=recipes.w8a8()).shape
      (2, 8, 8, 4)
    """
    lhs, rhs = as_array("conv_general_dilated", "lhs", lhs), as_array("conv_general_dilated", "rhs", rhs)
    specs = operand_specs("conv_general_dilated", lhs, rhs, spec, weight=1)
    window = {
        "window_strides": tuple(window_strides),
        "padding": padding if isinstance(padding, str) else tuple(tuple(p) for p in padding),
        "lhs_dilation": None if lhs_dilation is None else tuple(lhs_dilation),
        "rhs_dilation": None if rhs_dilation is None else tuple(rhs_dilation),
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
    }
    quantized = [isinstance(x, QTensor) or s is not None for x, s in zip((lhs, rhs), specs, strict=True)]
    if not any(quantized):
        if act_scale is not None or act_zero_point is not None:
            todo = "Pass spec=OpSpec(act=...)"
            raise quant_error("conv_general_dilated", "act_scale needs a spec for the activation", todo=todo, spec=spec)
        return lax.conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **window,
        )
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    sides = [
        Operand(s, tuple(i - x.ndim for i in range(x.ndim) if i != dims[0]))
        for s, x, dims in zip(specs, (lhs, rhs), (numbers.lhs_spec, numbers.rhs_spec), strict=True)
    ]
    static = sides[0].given("conv_general_dilated", lhs, act_scale, act_zero_point)
    for side, x in zip(sides, (lhs, rhs), strict=True):
        side.check_groups("conv_general_dilated", x)
    dtype = np.dtype(result_dtype(lhs, rhs, preferred_element_type))
    if isinstance(precision, list):
        precision = tuple(precision)
    return _conv_jit(_Conv(*sides, numbers, tuple(window.items()), precision, dtype), lhs, rhs, static, None)
