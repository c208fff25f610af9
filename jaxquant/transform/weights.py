"""A parameter on its way to an operation: which one, seen through which transposes, reshapes, slices and casts.

A `Weight` stands in the interpreter's environment for every value that is a planned parameter or a view of one. It
knows, for each of its axes, which axes of the parameter it is made of, so that the contracted axes of an operation are
axes of the parameter: found from the trace, never guessed from names or shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core import views
from jaxquant.core.affine import as_codes, prepare
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.granularity import PerGroup, PerTensor
from jaxquant.core.indices import clamped
from jaxquant.core.learned import Entry, learned_codes, learned_values
from jaxquant.core.qtensor import Operand, QTensor, Scale
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.trained import TrainedTensor
from jaxquant.transform.analysis.axes import factored

__all__ = [
    "ABSENT",
    "Absent",
    "Atom",
    "Dims",
    "Joined",
    "Part",
    "Value",
    "View",
    "Weight",
    "act_spec",
    "as_array",
    "as_joined",
    "as_matrix",
    "as_part",
    "as_weight",
    "dims_of",
    "from_matrix",
    "reshape_dims",
    "trained_activation",
    "trains",
]

_ids = itertools.count()


@dataclasses.dataclass(frozen=True)
class Atom:
    """A piece of the parameter's axes: all of one axis, or a factor of it after a reshape."""

    axes: frozenset[int]
    size: int
    id: int

    @classmethod
    def new(cls, axes: frozenset[int], size: int) -> Atom:
        """An atom unlike any other."""
        return cls(axes, size, next(_ids))


Dims = tuple[tuple[Atom, ...], ...]


def dims_of(shape: tuple[int, ...]) -> Dims:
    """Each axis (counted from the end) as one atom."""
    return tuple((Atom.new(frozenset({i - len(shape)}), n),) for i, n in enumerate(shape))


def reshape_dims(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Atoms of the axes after a row-major reshape; an atom that is cut becomes two."""

    def cut(atom: Atom, outer: int) -> tuple[Atom, Atom]:
        return Atom.new(atom.axes, outer), Atom.new(atom.axes, atom.size // outer)

    def merged(a: Atom, b: Atom) -> Atom:  # no finer description than the union of their axes
        return Atom.new(a.axes | b.axes, a.size * b.size)

    return factored(dims, shape, cut, merged)


@dataclasses.dataclass(frozen=True)
class View:
    """One step between the parameter and the operation, on a float array and on a QTensor.

    Attributes:
      name: for messages.
      array: the step on a float array.
      qtensor: the step on a QTensor.
      layer: makes the same step on one entry of the first axis, if the step leaves that axis alone; else None.
    """

    name: str
    array: Callable[[jax.Array], jax.Array]
    qtensor: Callable[[QTensor], QTensor]
    layer: Callable[[], View] | None = None

    def __call__(self, x: Operand) -> Operand:
        if isinstance(x, TrainedTensor):
            return TrainedTensor(self.qtensor(x), self.array(x.differentiable))
        return self.qtensor(x) if isinstance(x, QTensor) else self.array(x)


@functools.partial(jax.jit, static_argnames=("spec", "reduce_axes"))  # traced once for all weights of one shape
def _trained(
    w: jax.Array, steps: Entry | None, key: jax.Array | None, spec: QuantSpec, reduce_axes: tuple[int, ...]
) -> TrainedTensor:
    """A weight in training, by its own range or by learned ones."""
    if steps is None:
        q = as_codes(jax.lax.stop_gradient(w), spec, reduce_axes, key=key)
        return TrainedTensor(q, fake_quant(w, spec, reduce_axes=reduce_axes, key=key))
    blocks = scale_shape(w.shape, block_shape(w.shape, spec.granularity, reduce_axes))
    n = w.size // math.prod(blocks)
    q = learned_codes(w, spec, reduce_axes, steps, blocks)
    return TrainedTensor(q, learned_values(w, spec, reduce_axes, steps, n, blocks))


def act_spec(spec: QuantSpec) -> QuantSpec:
    """The spec of an activation with learned steps: one step for all of it, or one per group."""
    return spec if isinstance(spec.granularity, PerGroup) else dataclasses.replace(spec, granularity=PerTensor())


def trained_activation(x: jax.Array, steps: Entry, spec: QuantSpec, axes: tuple[int, ...]) -> TrainedTensor:
    """An activation by its learned steps: a scalar, or one for each group along the one axis that is contracted."""
    spec, axes = act_spec(spec), tuple(sorted(a - x.ndim for a in axes))
    n = math.prod(x.shape[a] for a in axes) if spec.group_size is None else spec.group_size
    blocks = scale_shape(x.shape, block_shape(x.shape, spec.granularity, axes))
    along = [blocks[a] if a - x.ndim in axes else 1 for a in range(x.ndim)]
    steps = {name: value.reshape(along if value.ndim else (1,) * x.ndim) for name, value in steps.items()}
    q = learned_codes(x, spec, axes, steps, blocks)
    return TrainedTensor(q, learned_values(x, spec, axes, steps, n, blocks))


def rounded_activation(
    x: jax.Array,
    spec: QuantSpec,
    axes: tuple[int, ...],
    key: jax.Array,
    scale: Scale | None,
    zero_point: jax.Array | None,
) -> TrainedTensor:
    """An activation rounded stochastically, by its own range or one that is given."""
    axes = tuple(sorted(a - x.ndim for a in axes))
    x, axes, scale, zero_point = prepare("quantized", x, spec, axes, scale, zero_point, key)
    q = as_codes(*jax.lax.stop_gradient((x,)), spec, axes, *jax.lax.stop_gradient((scale, zero_point)), key=key)
    return TrainedTensor(q, fake_quant(x, spec, reduce_axes=axes, scale=scale, zero_point=zero_point, key=key))


@dataclasses.dataclass(frozen=True)
class Weight:
    """A planned parameter, or a view of one.

    Attributes:
      path: the parameter's path.
      leaf: the array or QTensor, without its first ``stacked`` axes; None while planning.
      state: this parameter's entry of ``state`` (static activation ranges, learned steps), or None.
      dims: atoms of each axis of the view.
      dtype: dtype of the view.
      stacked: leading axes of the parameter that enclosing scans have consumed.
      steps: the views between leaf and value, first one first.
    """

    path: str
    leaf: Operand | None
    state: PyTree
    dims: Dims
    dtype: DTypeLike
    stacked: int = 0
    steps: tuple[View, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return tuple(math.prod(a.size for a in dim) for dim in self.dims)

    @property
    def ndim(self) -> int:
        """Rank of the view."""
        return len(self.dims)

    def steps_of(self, operand: Literal["weight", "act"]) -> Entry | None:
        """The learned range of the parameter or of its input; None if it is not learned."""
        return None if self.state is None else self.state.get(operand)

    def seen(self, step: View, dims: Dims, dtype: DTypeLike | None = None) -> Weight:
        """This weight through one more view."""
        return dataclasses.replace(
            self, dims=dims, steps=(*self.steps, step), dtype=self.dtype if dtype is None else dtype
        )

    def value(self) -> Operand:
        """The view itself, quantized if the leaf is: nothing trains here."""
        x = self.leaf
        assert x is not None
        for step in self.steps:
            x = step(x)
        return x

    def real(self) -> jax.Array:
        """The view in float: dequantized if need be."""
        x = self.value()
        return x.dequantize() if isinstance(x, QTensor) else x

    def operand(
        self, spec: QuantSpec | None, reduce_axes: tuple[int, ...], stacked: int = 0, key: jax.Array | None = None
    ) -> Operand:
        """The operand of an op: the QTensor; or codes for the forward and floats for the gradient, if the leaf trains.

        Args:
          spec: of the weight.
          reduce_axes: the axes that share a scale.
          stacked: leading axes of the parameter whose layers are quantized one by one, seen from a scan or not.
          key: for stochastic rounding, which layers share.
        """
        if isinstance(self.leaf, QTensor) or spec is None:
            return self.value()
        one = functools.partial(_trained, spec=spec, reduce_axes=reduce_axes)
        for _ in range(stacked - self.stacked):
            one = jax.vmap(one, in_axes=(0, 0, None))
        x: Operand = one(self.leaf, self.steps_of("weight"), key)
        for step in self.steps:
            x = step(x)
        return x

    def split(self, contracted: tuple[int, ...]) -> tuple[int, ...] | str:
        """The parameter's axes that make up the contracted axes of the view; a reason if only a part of one does."""
        inside = {atom.id for i in contracted for atom in self.dims[i]}
        atoms = [atom for dim in self.dims for atom in dim]
        reduced: list[int] = []
        for axis in sorted(set[int]().union(*(atom.axes for atom in atoms))):
            every = [atom for atom in atoms if axis in atom.axes]
            parts = [atom for atom in every if atom.size > 1]
            hit = {atom.id in inside for atom in parts or every}
            if parts and len(hit) == 2:
                return f"only a part of axis {axis} is contracted"
            if hit == {True}:
                reduced.append(axis)
        return tuple(reduced)


class Absent:
    """The type of `ABSENT`."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()
"""Stands for every value that is not a weight while planning, when nothing is computed."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights, and maybe arrays, side by side: what a concatenation of them gives (`jaxquant.transform.joined`).

    Attributes:
      parts: `Weight`s and other values.
      axis: along which they are joined.
      sizes: of each along that axis.
    """

    parts: tuple[Part, ...]
    axis: int
    sizes: tuple[int, ...]


Part: TypeAlias = "jax.Array | Weight | Absent"
"""A value that is no concatenation."""

Value: TypeAlias = "Part | Joined"
"""A value of a jaxpr that is evaluated with weights among its inputs."""


def as_weight(value: Value) -> Weight:
    """A value that is known to be a weight."""
    assert isinstance(value, Weight)
    return value


def as_joined(value: Value) -> Joined:
    """A value that is known to be a concatenation."""
    assert isinstance(value, Joined)
    return value


def as_part(value: Value) -> Part:
    """A value that is known to be no concatenation."""
    assert not isinstance(value, Joined)
    return value


def as_array(value: Value) -> jax.Array:
    """A value that is known to be an array: one of an equation that is computed, and no weight."""
    assert not isinstance(value, Weight | Joined | Absent)
    return value


def trains(value: Value) -> bool:
    """Whether a value is a weight, or several, of which one is in floats."""
    parts = value.parts if isinstance(value, Joined) else (value,)
    return any(isinstance(v, Weight) and not isinstance(v.leaf, QTensor) for v in parts)


def as_matrix(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One layer's weight as [channels, outputs]: the contracted axes, in their order, before the others."""
    moved = jnp.moveaxis(w, axes, tuple(range(len(axes))))
    return moved.reshape(math.prod(moved.shape[: len(axes)]), -1)


def from_matrix(matrix: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Inverse of `as_matrix`, for a weight of this shape."""
    first = [axis % len(shape) for axis in axes]
    moved = [*(shape[i] for i in first), *(n for i, n in enumerate(shape) if i not in first)]
    return jnp.moveaxis(matrix.reshape(moved), range(len(axes)), axes)


def transpose_view(permutation: tuple[int, ...]) -> View:
    """A transpose."""
    inner = tuple(i - 1 for i in permutation[1:])
    return View(
        "transpose",
        lambda x: jnp.transpose(x, permutation),
        lambda q: views.transpose(q, permutation),
        (lambda: transpose_view(inner)) if permutation[:1] == (0,) else None,
    )


def reshape_view(shape: tuple[int, ...], old: tuple[int, ...]) -> View:
    """A reshape, a squeeze, or new axes of size 1."""
    alone = shape[:1] == old[:1] and shape != ()
    return View(
        "reshape",
        lambda x: jnp.reshape(x, shape),
        lambda q: views.reshape(q, shape),
        (lambda: reshape_view(shape[1:], old[1:])) if alone else None,
    )


def cast_view(dtype: DTypeLike) -> View:
    """A cast to a float dtype."""
    return View(
        "convert_element_type",
        lambda x: x.astype(dtype),
        lambda q: views.cast(q, dtype),
        lambda: cast_view(dtype),
    )


def flip_view(axes: tuple[int, ...]) -> View:
    """A flip (the kernel of a transposed convolution)."""
    flip = lambda x: jax.lax.rev(x, axes)  # noqa: E731
    inner = tuple(a - 1 for a in axes)
    layer = None if 0 in axes else lambda: flip_view(inner)
    return View("rev", flip, lambda q: views.move(q, flip, axes), layer)


def slice_view(cuts: tuple[tuple[int, int | jax.Array, int], ...]) -> View:
    """Slices ``(axis, start, size)``; starts may be traced."""

    def array(x: jax.Array) -> jax.Array:
        for axis, start, size in cuts:
            x = jax.lax.dynamic_slice_in_dim(x, clamped(start, size, x.shape[axis]), size, axis)
        return x

    def qtensor(q: QTensor) -> QTensor:
        for axis, start, size in cuts:
            q = views.slice_along(q, axis, start, size)
        return q

    inner = tuple((axis - 1, start, size) for axis, start, size in cuts)
    layer = None if any(axis == 0 for axis, _, _ in cuts) else lambda: slice_view(inner)
    return View("slice", array, qtensor, layer)
