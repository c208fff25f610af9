"""`conv_general_dilated` with quantized operands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.kernels.dequantized import in_own_dtype
from jaxquant.ops.operands import Call, Pair, Side, precision_of, refuse_product_specs, refuse_range
from jaxquant.ops.problem import Convolution, Geometry
from jaxquant.ops.select import run
from jaxquant.ops.tangents import straight_through

__all__ = ["conv_general_dilated"]


@dataclasses.dataclass(frozen=True)
class _Conv(Call):
    """The static half of a `conv_general_dilated` call."""

    lhs: Side
    rhs: Side
    geometry: Geometry
    precision: lax.PrecisionLike
    dtype: DTypeLike

    def keep(self, *operands: PyTree) -> tuple[jax.Array, None]:
        lhs, rhs, lhs_static, rhs_static = operands
        x, kernel = self.lhs.quantized(lhs, lhs_static), self.rhs.quantized(rhs, rhs_static)
        return run(Convolution.of(x, kernel, self.precision, self.dtype, self.geometry)), None

    def reference(self, *operands: PyTree) -> jax.Array:
        lhs, rhs, lhs_static, rhs_static = operands
        problem = Convolution.of(lhs, rhs, self.precision, self.dtype, self.geometry)
        return in_own_dtype(problem, self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static))


def _checked(
    function: str,
    lhs: Operand,
    rhs: Operand,
    numbers: lax.ConvGeneralDilatedDimensionNumbers,
    precision: lax.PrecisionLike,
    **window: Any,
) -> tuple[tuple[int, ...], Geometry]:
    """The result's shape, and the geometry in full, if `lax.conv_general_dilated` accepts the call."""
    try:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=numbers, precision=precision, **window)
        shape = jax.eval_shape(conv, *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (lhs, rhs))).shape
    except (TypeError, ValueError, RuntimeError) as error:
        rule = str(error).strip().split("\n")[0].rstrip(".").removeprefix(f"{function} ")
        todo = "Give the arguments that jax.lax.conv_general_dilated takes"
        raise quant_error(function, rule, todo=todo, lhs=lhs.shape, rhs=rhs.shape, **window) from None
    strides, padding = tuple(map(int, window["window_strides"])), window["padding"]
    lhs_dilation, rhs_dilation = (
        tuple(map(int, window[name] or [1] * len(strides))) for name in ("lhs_dilation", "rhs_dilation")
    )
    if isinstance(padding, str):
        spatial = [[x.shape[i] for i in spec[2:]] for x, spec in zip((lhs, rhs), numbers, strict=False)]
        reach = [(n - 1) * d + 1 for n, d in zip(spatial[1], rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(spatial[0], reach, strides, padding)
    return shape, Geometry(
        *map(tuple, numbers),
        strides=strides,
        padding=tuple((int(lo), int(hi)) for lo, hi in padding),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_groups=int(window["feature_group_count"]),
        batch_groups=int(window["batch_group_count"]),
    )


def conv_general_dilated(
    lhs: ArrayLike | QTensor,
    rhs: ArrayLike | QTensor,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    spec: OpSpec | None = None,
    act_scale: ArrayLike | None = None,
    act_zero_point: ArrayLike | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` whose operands may be quantized, or are quantized on the way.

    On CPU and TPU an int8 convolution with int32 accumulation where kernel scales are per output feature (or per
    tensor) and activation scales per image (or per tensor); weight-only with the activation as int8 digits, as in
    `dot_general`. Scales per group along the contraction, float number types, batch groups, weight-only feature groups,
    and everything on GPUs (cuDNN has no such convolution) take the float convolution of the dequantized operands.

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
    function = "conv_general_dilated"
    pair = Pair.of(function, lhs, rhs, spec, weight=1)
    refuse_product_specs(function, pair.spec)
    lhs, rhs = pair.lhs, pair.rhs
    window = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
    }
    if pair.floats is not None:
        refuse_range(function, act_scale, act_zero_point)
        return lax.conv_general_dilated(
            *pair.floats,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **window,
        )
    dtype, precision = pair.result_dtype(preferred_element_type), precision_of(function, precision)
    shape, geometry = _checked(function, lhs, rhs, dimension_numbers, precision, **window)
    if 0 in lhs.shape or 0 in rhs.shape:
        return jnp.zeros(shape, dtype)  # no values to take a range from
    sides = pair.sides(geometry.lhs_spec[1:], geometry.rhs_spec[1:])
    static = pair.static(sides, act_scale, act_zero_point)
    return straight_through(_Conv(*sides, geometry, precision, dtype), lhs, rhs, *static)
