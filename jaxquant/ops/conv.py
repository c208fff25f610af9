"""`conv_general_dilated` with quantized operands."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.ops.digits import digit_count, digit_matrix, sum_of_parts
from jaxquant.ops.floats import in_own_dtype
from jaxquant.ops.integer import overflow_limit
from jaxquant.ops.machine import int8_dots
from jaxquant.ops.matrix import Axes, Matrix, matrix
from jaxquant.ops.operands import (
    Call,
    Operand,
    Pair,
    Static,
    precision_of,
    refuse_product_specs,
    refuse_range,
    wide_values,
)
from jaxquant.ops.tangents import straight_through

__all__ = ["Window", "choose", "conv_general_dilated"]

Formulation = Literal["integer", "digits", "dequantized"]


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Dimension numbers and window, with nothing left to a default."""

    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int


@dataclasses.dataclass(frozen=True)
class _Conv(Call):
    """The static half of a `conv_general_dilated` call."""

    lhs: Operand
    rhs: Operand
    geometry: _Geometry
    precision: Any
    dtype: Any

    def forward(self, lhs: Any, rhs: Any, lhs_static: Static, rhs_static: Static) -> jax.Array:
        g = self.geometry
        x, kernel = self.lhs.quantized(lhs, lhs_static), self.rhs.quantized(rhs, rhs_static)
        left: Any = _rows(x, g.lhs_spec[0])
        right: Any = _rows(kernel, g.rhs_spec[0])
        window = Window(g.feature_groups, g.batch_groups, math.prod(kernel.shape[i] for i in g.rhs_spec[2:]))
        runs = {
            "integer": lambda: self._restored(_integer(g, left, right, lhs.shape, rhs.shape)),
            "digits": lambda: self._digits(left, right, lhs.shape, rhs.shape),
            "dequantized": lambda: self._float(wide_values(x), wide_values(kernel), lhs, rhs),
        }
        other, *rest = (choose(platform, left, right, window) for platform in ("default", "cpu", "tpu"))
        own = {name: runs[how] for name, how in zip(("cpu", "tpu"), rest, strict=True) if how != other}
        return lax.platform_dependent(**own, default=runs[other]) if own else runs[other]()

    def reference(self, lhs: Any, rhs: Any, lhs_static: Static, rhs_static: Static) -> jax.Array:
        return self._float(self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static), lhs, rhs)

    def _float(self, x: jax.Array, kernel: jax.Array, lhs: Any, rhs: Any) -> jax.Array:
        """The convolution of the real values of lhs and rhs."""
        g = self.geometry

        def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(
                x,
                kernel,
                g.strides,
                g.padding,
                g.lhs_dilation,
                g.rhs_dilation,
                lax.ConvDimensionNumbers(g.lhs_spec, g.rhs_spec, g.out_spec),
                g.feature_groups,
                g.batch_groups,
                self.precision,
            ).astype(self.dtype)

        return in_own_dtype(conv, x, kernel, (lhs.dtype, rhs.dtype, self.dtype), self.precision)

    def _digits(self, x: jax.Array, rhs: Matrix, lshape: tuple[int, ...], rshape: tuple[int, ...]) -> jax.Array:
        """A float activation as int8 digits: further images of one int8 convolution, weighted and summed afterwards."""
        out = _integer(self.geometry, digit_matrix(x, self.precision), rhs, lshape, rshape)
        return self._restored(sum_of_parts(out, digit_count(self.precision), 0))

    def _restored(self, out: jax.Array) -> jax.Array:
        """[images, spatial..., features] in the order and dtype that the call asks for."""
        spec = self.geometry.out_spec
        canonical = (spec[0], *spec[2:], spec[1])
        if len(canonical) == 3:
            out = out[:, 0]
        return _reordered(out, tuple(canonical.index(i) for i in range(len(canonical)))).astype(self.dtype)


class Window(NamedTuple):
    """What `choose` has to know of a convolution beside its operands.

    Attributes:
      feature_groups, batch_groups: as for `jax.lax.conv_general_dilated`.
      places: of the window: products of one feature that a result sums up.
    """

    feature_groups: int = 1
    batch_groups: int = 1
    places: int = 1


def choose(
    platform: str, x: Matrix | jax.Array | None, kernel: Matrix | jax.Array | None, window: Window
) -> Formulation:
    """How a convolution is computed, ``"dequantized"`` being the float convolution.

    Args:
      platform: what the program is lowered for: ``"cpu"``, ``"tpu"`` or another.
      x, kernel: images and output features as rows, floats or quantized; None where scales vary within a group.
      window: the rest of the call.
    """
    if not _is_whole(kernel) or x is None or window.batch_groups > 1:
        return "dequantized"
    # Sums that could overflow are cut along the input features, where these are in one group.
    longest = overflow_limit(127 if isinstance(x, jax.Array) else x.reach, kernel.reach)
    if kernel.shape[2] > longest and (window.feature_groups > 1 or window.places > longest):
        return "dequantized"
    on_cpu = platform == "cpu" and int8_dots() != "none"
    if isinstance(x, Matrix):
        # cuDNN has no convolution from int8 to int32, and XLA refuses to compile one for NVIDIA GPUs.
        return "integer" if _is_whole(x) and (on_cpu or platform == "tpu") else "dequantized"
    # Digits have one scale per image: too coarse where features are summed apart, and no gain for small kernels.
    return "digits" if on_cpu and window.feature_groups == 1 and x.dtype != jnp.float64 else "dequantized"


def _is_whole(x: Matrix | jax.Array | None) -> TypeGuard[Matrix]:
    """Whether an operand is integers with one scale per row."""
    return isinstance(x, Matrix) and x.integer and x.groups == 1


def _rows(x: QTensor | jax.Array, first: int) -> Matrix | jax.Array | None:
    """An operand as [1, images or output features, everything else]; None if its scales vary within a group."""
    axes = Axes((), (first,), tuple(i for i in range(x.ndim) if i != first))
    return axes.flatten(x) if isinstance(x, jax.Array) else matrix(x, axes)


def _reordered(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`jnp.transpose`, in as few axes as it takes.

    XLA folds a transpose into the layout of a convolution and then leaves the fast path; the reshapes here prevent it.
    """
    runs: list[list[int]] = []
    for axis in order:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    merged = sorted(runs)
    shape = x.shape
    x = x.reshape([math.prod(shape[i] for i in run) for run in merged])
    return jnp.transpose(x, [merged.index(run) for run in runs]).reshape([shape[i] for i in order])


def _codes(x: Matrix, shape: tuple[int, ...], spec: tuple[int, ...], *, kernel: bool) -> jax.Array:
    """Codes as [images, spatial..., features], or [spatial..., input features, output features] for a kernel.

    One spatial axis becomes two: XLA has no fast path for convolutions of rank 1.
    """
    rows_first = (spec[0], *(i for i in range(len(shape)) if i != spec[0]))
    target = (*spec[2:], spec[1], spec[0]) if kernel else (spec[0], *spec[2:], spec[1])
    codes = x.codes.reshape(-1, *(shape[i] for i in rows_first[1:]))
    codes = _reordered(codes, tuple(rows_first.index(i) for i in target))
    return jnp.expand_dims(codes, 0 if kernel else 1) if len(shape) == 3 else codes


def _integer(g: _Geometry, lhs: Matrix, rhs: Matrix, lshape: tuple[int, ...], rshape: tuple[int, ...]) -> jax.Array:
    """int8 convolution with exact zero-point corrections, scaled: [images, spatial..., features].

    Padding contributes real 0, that is nothing, to each of the four sums of (q_l - z_l)(q_r - z_r).

    Args:
      g: the geometry of the call.
      lhs: images as rows; there may be more of them than lshape says.
      rhs: output features as rows.
      lshape, rshape: the shapes of the operands.
    """
    x, kernel = _codes(lhs, lshape, g.lhs_spec, kernel=False), _codes(rhs, rshape, g.rhs_spec, kernel=True)
    last = x.ndim - 1
    lift = (1,) * (x.ndim - len(lshape))  # for a spatial axis that was added
    dilate = [(0, 0, d - 1) for d in (1, *lift, *g.lhs_dilation, 1)]
    numbers = lax.ConvDimensionNumbers(
        (0, last, *range(1, last)), (last, last - 1, *range(last - 1)), (0, last, *range(1, last))
    )

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            lax.pad(x, jnp.int8(0), dilate),  # XLA has no fast path for dilated images
            kernel,
            lift + g.strides,
            ((0, 0),) * len(lift) + g.padding,
            rhs_dilation=lift + g.rhs_dilation,
            dimension_numbers=numbers,
            feature_group_count=g.feature_groups,
            preferred_element_type=jnp.int32,
        )

    def all_features(sums: jax.Array) -> jax.Array:
        """One output channel per feature group to one per output feature."""
        return jnp.repeat(sums, kernel.shape[-1] // g.feature_groups, axis=last)

    lz = None if lhs.zero_point is None else lhs.zero_point.reshape(-1, *[1] * last)
    rz = None if rhs.zero_point is None else rhs.zero_point.reshape(*[1] * last, -1)

    def exact(x: jax.Array, kernel: jax.Array) -> jax.Array:
        one_image, one_feature = jnp.ones_like(x[:1]), jnp.ones_like(kernel[..., : g.feature_groups])
        out = conv(x, kernel)
        if rz is not None:
            out = out - rz * all_features(conv(x, one_feature))
        if lz is not None:
            out = out - lz * conv(one_image, kernel)
        if lz is not None and rz is not None:
            out = out + lz * rz * all_features(conv(one_image, one_feature))
        return out.astype(jnp.float32)

    features = kernel.shape[-2]
    step = max(overflow_limit(lhs.reach, rhs.reach) // math.prod(kernel.shape[:-2]), 1)
    if features <= step:
        out = exact(x, kernel)
    else:
        cuts = [exact(x[..., i : i + step], kernel[..., i : i + step, :]) for i in range(0, features, step)]
        out = functools.reduce(jnp.add, cuts)
    return out * lhs.scale.reshape(-1, *[1] * last) * rhs.scale.reshape(*[1] * last, -1)


def _checked(
    function: str, lhs: Any, rhs: Any, numbers: Any, precision: Any, **window: Any
) -> tuple[tuple[int, ...], _Geometry]:
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
    return shape, _Geometry(
        *map(tuple, numbers),
        strides=strides,
        padding=tuple((int(lo), int(hi)) for lo, hi in padding),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_groups=int(window["feature_group_count"]),
        batch_groups=int(window["batch_group_count"]),
    )


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
    if pair.in_float:
        refuse_range(function, act_scale, act_zero_point)
        return lax.conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **window,
        )
    dtype, precision = pair.result_dtype(preferred_element_type), precision_of(function, precision)
    shape, geometry = _checked(function, lhs, rhs, dimension_numbers, precision, **window)
    if 0 in lhs.shape or 0 in rhs.shape:
        return jnp.zeros(shape, dtype)  # no values to take a range from
    sides = pair.operands(geometry.lhs_spec[1:], geometry.rhs_spec[1:])
    static = pair.static(sides, act_scale, act_zero_point)
    return straight_through(_Conv(*sides, geometry, precision, dtype), lhs, rhs, *static)
