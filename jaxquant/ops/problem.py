"""The problems that kernels solve, and the interface of a kernel.

A problem is a pytree of the unchanged operands of one product: arrays and `QTensor`s. The choice of a kernel depends on
shapes and dtypes alone, so that a plan can make it for arrays that do not exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.typing import DTypeLike

from jaxquant.core import views
from jaxquant.core.arithmetic import promoted
from jaxquant.core.blocks import spread
from jaxquant.core.by_platform import Platform, Target
from jaxquant.core.layout import inverse
from jaxquant.core.qtensor import Operand, QTensor, flat, scale_values
from jaxquant.core.sizes import number
from jaxquant.ops.axes import Axes, split_up
from jaxquant.ops.forms import Form, canonical, form, matrix
from jaxquant.ops.placed import Placed
from jaxquant.ops.pytrees import pytree
from jaxquant.ops.quantized_matrix import Matrix, Packed
from jaxquant.ops.trained import is_in_training

__all__ = [
    "EXPERTS",
    "ROWS",
    "Convolution",
    "Geometry",
    "Kernel",
    "Problem",
    "Product",
    "RaggedProduct",
    "Window",
    "in_stored_order",
    "wide_values",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Two operands of a product.

    Attributes:
      x, w: the activation and the weight, each an array or a QTensor, or the shape of one.
      precision: as for `jax.lax.dot_general`; None stands for JAX's default.
      result: the requested dtype.
    """

    x: Operand
    w: Operand
    precision: lax.PrecisionLike
    result: DTypeLike

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the float product, by the operands' own dtypes."""
        return promoted(self.x.dtype, self.w.dtype)

    @property
    def weight(self) -> QTensor:
        """The weight, which is quantized in the problems of most kernels."""
        assert isinstance(self.w, QTensor)
        return self.w

    @property
    def trained(self) -> bool:
        """Whether both operands are float arrays in training, so that their real values cost nothing."""
        return all(is_in_training(v) for v in (self.x, self.w))

    @functools.cached_property
    def forms(self) -> tuple[Form, Form]:
        """The canonical forms of both operands, from shapes alone."""
        raise NotImplementedError

    @property
    def float_operation(self) -> tuple[Primitive, dict[str, Any]] | None:
        """The primitive of the float operation, with the parameters that policies of `jax.checkpoint` read."""
        return None

    @functools.cached_property
    def quantized(self) -> tuple[Matrix | Packed, ...]:
        """The forms of the quantized operands."""
        return tuple(f for f in self.forms if isinstance(f, Matrix | Packed))

    def both(self, test: Callable[[Matrix | Packed], bool]) -> bool:
        """Whether both operands are quantized and pass the test."""
        return len(self.quantized) == 2 and all(map(test, self.quantized))

    @functools.cached_property
    def wide(self) -> bool:
        """Whether an operand is float64."""
        return any(_scale_dtype(f) == jnp.float64 for f in self.forms if f is not None)

    def float_values(self) -> tuple[jax.Array, jax.Array]:
        """The real values of both, in float32 at least where they come from codes."""
        return wide_values(self.x), wide_values(self.w)

    def in_float(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The float product of the values of both, in the result's shape."""
        raise NotImplementedError

    def like(self) -> jax.Array:
        """An array of the product's shape and dtype, quick to trace: the float product of codes."""
        x, w = (v.logical_codes() if isinstance(v, QTensor) else v for v in (self.x, self.w))
        return self.in_float(x.astype(self.dtype), w.astype(self.dtype)).astype(self.result)


@pytree("precision", "result", "x_axes", "w_axes", "weight_first", "placed")
@dataclasses.dataclass(frozen=True, eq=False)
class Product(Problem):
    """A `jax.lax.dot_general`.

    Attributes:
      x_axes, w_axes: the axes of both, in corresponding order.
      weight_first: whether the weight is the left operand.
      placed: how the operands are partitioned over devices, where that is part of their types.
    """

    x_axes: Axes
    w_axes: Axes
    weight_first: bool = False
    placed: Placed | None = None

    @classmethod
    def of(
        cls,
        lhs: Operand,
        rhs: Operand,
        lhs_axes: Axes,
        rhs_axes: Axes,
        precision: lax.PrecisionLike,
        result: DTypeLike,
        placed: Placed | None = None,
    ) -> Product:
        """Picks the weight: the operand stored quantized, else the one quantized on the way; ``rhs`` if both are."""
        first = _kind(lhs) > _kind(rhs)
        x, w = ((rhs, rhs_axes), (lhs, lhs_axes)) if first else ((lhs, lhs_axes), (rhs, rhs_axes))
        return cls(x[0], w[0], precision, result, x[1], w[1], first, placed)

    def with_groups_on_one_axis(self) -> Product:
        """The same product by a stored weight that has groups along one axis, where it has blocks along several.

        The other axes have a scale for each element then, that of its block.
        """
        if is_in_training(self.w) or self.weight.split is None:
            return self
        w, split = self.weight, self.weight.ndim + self.weight.split
        sizes = [w.shape[i] if s > 1 and i != split else s for i, s in enumerate(w.scale.shape)]
        if sizes == list(w.scale.shape):
            return self
        blocks = {"scale": scale_values(w.scale), "zero_point": w.zero_point, "offset": flat(w.offset)}
        rows = {name: None if v is None else spread(v, sizes) for name, v in blocks.items()}
        return dataclasses.replace(self, w=w.replace(**rows))

    def in_stored_order(self) -> Product:
        """The same product by a weight whose axes are in the order in which its codes are stored."""
        w, axes = in_stored_order(self.weight, self.w_axes)
        return dataclasses.replace(self, w=w, w_axes=axes)

    @functools.cached_property
    def forms(self) -> tuple[Form, Form]:
        """[B, M, K] and [B, N, K]; None for an operand whose scales form no groups along K."""
        return form(self.x, self.x_axes), form(self.w, self.w_axes)

    @property
    def float_operation(self) -> tuple[Primitive, dict[str, Any]]:
        """As for `Problem`."""
        return lax.dot_general_p, {"dimension_numbers": self.numbers, "precision": self.precision}

    @property
    def numbers(self) -> lax.DotDimensionNumbers:
        """The dimension numbers."""
        left, right = (self.w_axes, self.x_axes) if self.weight_first else (self.x_axes, self.w_axes)
        return (left.contract, right.contract), (left.batch, right.batch)

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """The left and the right operand."""
        return (self.w, self.x) if self.weight_first else (self.x, self.w)

    @functools.cached_property
    def rows(self) -> float:
        """M, the rows of the activation."""
        return math.prod(number(self.x.shape[i]) for i in self.x_axes.rows)

    @functools.cached_property
    def length(self) -> float:
        """K, the contracted length."""
        return math.prod(number(self.w.shape[i]) for i in self.w_axes.contract)

    def on_each_device(self, run: Callable[[Product], jax.Array]) -> jax.Array:
        """The product, by ``run`` of the parts that each device has."""
        assert self.placed is not None

        def part(lhs: Operand, rhs: Operand) -> jax.Array:
            x, w = (rhs, lhs) if self.weight_first else (lhs, rhs)
            return run(dataclasses.replace(self, x=x, w=w, placed=None))

        return self.placed.run(part, *self.operands)

    def canonical(self) -> tuple[Any, Any]:
        """The operands in canonical form, as arrays; packed codes stay packed."""
        return canonical(self.x, self.x_axes), canonical(self.w, self.w_axes)

    def matrices(self) -> tuple[Any, Any]:
        """The operands in canonical form with one code per element."""
        return _whole(self.x, self.x_axes), _whole(self.w, self.w_axes)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Batch axes, rows of the left operand, and rows of the right one."""
        batch, x_rows = ([self.x.shape[i] for i in part] for part in (self.x_axes.batch, self.x_axes.rows))
        w_rows = [self.w.shape[i] for i in self.w_axes.rows]
        return (*batch, *w_rows, *x_rows) if self.weight_first else (*batch, *x_rows, *w_rows)

    def split(self, value: jax.Array) -> jax.Array:
        """[B or 1, M or 1, N or 1] in the axes of the result, which are 1 where it has 1.

        A TPU's compiler scales sums within the product where they are split before that, and writes the result in
        the order of axes that its users want: for two sequences of tokens to heads, one pass follows the product,
        and two where the scaled result is split.
        """
        x, w = self.x, self.w
        batch = [x.shape[i] for i in self.x_axes.batch]
        rows, columns = [x.shape[i] for i in self.x_axes.rows], [w.shape[i] for i in self.w_axes.rows]
        if self.weight_first:
            value, rows, columns = jnp.swapaxes(value, 1, 2), columns, rows
        return split_up(value, (batch, rows, columns))

    def restored(self, sums: jax.Array, rows: jax.Array | None = None, columns: jax.Array | None = None) -> jax.Array:
        """Sums [B, M, N] in the axes and the dtype of the result.

        They are multiplied by scales [B or 1, M or 1, 1] of the activation and [B or 1, N or 1, 1] of the weight.
        """
        out = self.split(sums)
        if rows is not None:
            out = out * self.split(rows)
        if columns is not None:
            out = out * self.split(jnp.swapaxes(columns, 1, 2))
        return out.astype(self.result)

    def in_float(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """As for `Problem`."""
        lhs, rhs = (w, x) if self.weight_first else (x, w)
        return lax.dot_general(lhs, rhs, self.numbers, precision=self.precision)


class Window(NamedTuple):
    """The properties of a convolution that the choice of a kernel depends on, beside its operands.

    Attributes:
      feature_groups, batch_groups: as for `jax.lax.conv_general_dilated`.
      places: positions in the window: the products of one feature that a result sums.
    """

    feature_groups: int = 1
    batch_groups: int = 1
    places: int = 1


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Dimension numbers and window of a convolution, with all defaults filled in."""

    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int

    def conv(
        self, x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike = None, result: DTypeLike | None = None
    ) -> jax.Array:
        """`jax.lax.conv_general_dilated`."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            lax.ConvDimensionNumbers(self.lhs_spec, self.rhs_spec, self.out_spec),
            self.feature_groups,
            self.batch_groups,
            precision,
            result,
        )


@pytree("precision", "result", "geometry", "window")
@dataclasses.dataclass(frozen=True, eq=False)
class Convolution(Problem):
    """A `jax.lax.conv_general_dilated` of images and a kernel.

    Attributes:
      geometry: of the call.
      window: of the geometry and the kernel's shape.
    """

    geometry: Geometry
    window: Window

    @classmethod
    def of(
        cls, x: Operand, w: Operand, precision: lax.PrecisionLike, result: DTypeLike, geometry: Geometry
    ) -> Convolution:
        """The problem of a call."""
        places = math.prod(w.shape[i] for i in geometry.rhs_spec[2:])
        return cls(x, w, precision, result, geometry, Window(geometry.feature_groups, geometry.batch_groups, places))

    @property
    def float_operation(self) -> tuple[Primitive, dict[str, Any]]:
        """As for `Problem`."""
        return lax.conv_general_dilated_p, {}

    @property
    def _axes(self) -> tuple[Axes, Axes]:
        firsts = (self.x, self.geometry.lhs_spec[0]), (self.w, self.geometry.rhs_spec[0])
        x, w = (Axes((), (i,), tuple(j for j in range(v.ndim) if j != i)) for v, i in firsts)
        return x, w

    @functools.cached_property
    def forms(self) -> tuple[Form, Form]:
        """[1, images, rest] and [1, output features, rest], with one code per element; or None."""
        x, w = self._axes
        return form(self.x, x, whole=True), form(self.w, w, whole=True)

    def matrices(self) -> tuple[Any, Any]:
        """The same, of arrays."""
        x, w = self._axes
        return _whole(self.x, x), _whole(self.w, w)

    def in_float(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """As for `Problem`."""
        return self.geometry.conv(x, w, self.precision)


@pytree("precision", "result")
@dataclasses.dataclass(frozen=True, eq=False)
class RaggedProduct(Problem):
    """A `jax.lax.ragged_dot` of rows [M, K] and experts [E, K, N].

    Attributes:
      sizes: rows of each expert, in order, [E].
    """

    sizes: jax.Array

    @functools.cached_property
    def forms(self) -> tuple[Form, Form]:
        """[1, M, K] and [E, N, K], with one code per element; or None."""
        return form(self.x, ROWS, whole=True), form(self.w, EXPERTS, whole=True)

    def matrices(self) -> tuple[Any, Any]:
        """The same, of arrays, both of which are quantized."""
        assert isinstance(self.x, QTensor)
        return matrix(self.x, ROWS), matrix(self.weight, EXPERTS)

    def in_float(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """As for `Problem`."""
        return lax.ragged_dot(x, w, self.sizes, precision=self.precision)


ROWS, EXPERTS = Axes.of(2, (), (1,)), Axes.of(3, (0,), (1,))
"""The axes of the operands of a ragged product."""


def _whole(x: Operand, axes: Axes) -> Matrix | jax.Array | None:
    """An operand in canonical form, with one code per element."""
    return matrix(x, axes) if isinstance(x, QTensor) else axes.flatten(x)


def in_stored_order(w: QTensor, axes: Axes) -> tuple[QTensor, Axes]:
    """A weight whose axes are in the order in which its codes are stored, and these axes."""
    place = inverse(w.stored_order)
    return views.in_stored_order(w), Axes(*(tuple(place[i] for i in part) for part in dataclasses.astuple(axes)))


def _kind(x: Operand) -> int:
    """0 for a float array, 1 for an array quantized on the way, 2 for a stored QTensor."""
    return isinstance(x, QTensor) + (not is_in_training(x))


def _scale_dtype(x: Matrix | Packed | jax.ShapeDtypeStruct) -> np.dtype:
    return x.scale.dtype if isinstance(x, Matrix | Packed) else x.dtype


def wide_values(x: Operand) -> jax.Array:
    """The values of an operand, in float32 (or float64) where they come from codes."""
    return x.dequantize(promoted(x.dtype, jnp.float32)) if isinstance(x, QTensor) else x


P = TypeVar("P", bound=Problem, contravariant=True)


@dataclasses.dataclass(frozen=True)
class Kernel(Generic[P]):
    """One way to compute a class of problems. Equal kernels run the same code, lowered once for several platforms."""

    title: ClassVar[str]
    """The name of kernels that all have the same; others override `name`."""
    operation: ClassVar[type[Problem]] = Product
    """The class of problems that it solves."""
    platforms: ClassVar[tuple[Platform, ...]] = get_args(Platform)
    """The platforms that it is lowered for."""
    chips: ClassVar[tuple[str, ...]] = ()
    """The chips of these platforms that it runs on, as JAX names them; () is all of them."""
    exact: ClassVar[bool] = False
    """Whether it sums integers, so that with one scale per row the result does not depend on how codes are stored."""

    @property
    def name(self) -> str:
        """The name in plans."""
        return self.title

    @classmethod
    def runs_on(cls, target: Target) -> bool:
        """Whether it is lowered for a target."""
        return target.platform in cls.platforms and (not cls.chips or target.chip in cls.chips)

    @classmethod
    def takes(cls, problem: P) -> Kernel[P] | None:
        """The kernel set up for a problem of its operation, on a target it runs on; None if it does not take it."""
        raise NotImplementedError

    def on(self, target: Target) -> Kernel[P]:
        """The same kernel, set up for a chip; by default it is the same on all."""
        del target
        return self

    def run(self, problem: P) -> jax.Array:
        """The product, in float32 or the dtype of the float product."""
        raise NotImplementedError
