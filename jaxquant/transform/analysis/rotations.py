"""`rotation_groups`: which axes of parameters one orthogonal matrix can turn together, by a function's trace.

Write every value of the residual stream in another orthogonal basis: what writes to it (the embedding, projections)
gets the matrix on its outputs, what reads it (queries, gates, the head) on its inputs, an RMS norm without gains does
not notice, and the function stays what it is. So it does for the values of an attention, head by head, and the
projection behind it.

The unknown of an axis (`jaxquant.transform.analysis.equations`) is an orthogonal matrix. The terms of a sum, and
contracted axes, have one basis. A product with a value that is constant along an axis keeps the basis there; the sum
of squares along an axis has none; all other operations, and the function's results, fix the basis. A reshape that cuts
an axis leaves one matrix for all pieces of the inner length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxquant.core.paths import Leaf, Params
from jaxquant.core.types import PyTree
from jaxquant.ptq.bases import Rotation
from jaxquant.transform.analysis.equations import (
    Dim,
    Equations,
    Piece,
    Unknown,
    Value,
    joined,
    moving,
    rules,
    traced_for,
)  # fmt: skip
from jaxquant.transform.analysis.flow import Flow, kept
from jaxquant.transform.analysis.walk import Rule
from jaxquant.transform.plan import Plan
from jaxquant.transform.primitives import shape_of

__all__ = ["RotationGroup", "rotation_groups"]


@dataclasses.dataclass(frozen=True)
class RotationGroup:
    """Axes of parameters that one orthogonal matrix can turn; made by `rotation_groups`.

    Attributes:
      sinks: (path, axis) of the planned weights that contract the channels; the axis is counted from the end.
      others: (path, axis) of all other parameters that turn along.
      size: of the matrix. An axis of several times that size is turned piece by piece.
    """

    sinks: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]
    size: int

    def __str__(self) -> str:
        show = lambda members: ", ".join(f"{path}[{axis}]" for path, axis in members)  # noqa: E731
        return f"{show(self.others)} -> {show(self.sinks)} ({self.size} channels)"

    def random(self, key: jax.Array) -> jax.Array:
        """A random orthogonal matrix [size, size], as flat as `ptq.bases.Rotation`: Hadamard where there is one."""
        return Rotation.random(key, self.size).inputs(jnp.eye(self.size))


def rotation_groups(
    fn: Callable[..., PyTree], plan: Plan, params: Params, *args: PyTree, **kwargs: PyTree
) -> tuple[RotationGroup, ...]:
    """Which orthogonal matrices can be moved into the parameters of ``fn``, and where each goes.

    Args:
      fn: a function of params; traced, never run.
      plan: its plan; a group is reported if it turns input channels of a planned weight.
      params: its parameters, as arrays: a gain counts as none if all its numbers are one (see `fold_gains`).
      *args, **kwargs: its further arguments: arrays or shapes, and anything static.

    Returns:
      A tuple of `RotationGroup`, in the order of the plan. `rotate` applies one.

    Raises:
      QuantError: if params do not fit the plan.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> fn, x = lambda p, x: (x @ p["a"]) @ p["b"], jnp.ones((3, 4))
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("b", jq.OpSpec(jq.QuantSpec("int8")))])
      >>> print(*jq.invariances.rotation_groups(fn, plan, params, x))
      a[-1] -> b[-2] (8 channels)

    Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), figures 2 and 3, and Liu et al. 2024 (SpinQuant,
      arXiv:2405.16406), figure 1: R1 is the group of the residual stream, R2 those of the values. There they are named
      by hand; here they are the solutions of the trace's equations.
    """
    bases = _Bases()
    bases.solve(traced_for("rotation_groups", fn, plan, params, args, kwargs))
    out = []
    for first, group in bases.solutions(plan):
        members = [(u.path, u.axis) for u in group]
        sinks = tuple(m for m in members if m[0] in plan and m[1] in plan[m[0]].reduce_axes)
        others = tuple(m for m in members if m not in sinks)
        if others:
            out.append(RotationGroup(sinks, others, first.root.block))
    return tuple(out)


class _Matrix(Unknown):
    """The matrix of one axis of one parameter.

    Attributes:
      block: its size; the axis is so many or a multiple.
      constant: whether the parameter has one value all along the axis.
    """

    def __init__(self, path: str, axis: int, size: int, constant: bool):
        super().__init__(path, axis, size)
        self.block, self.constant = size, constant

    @property
    def pieces(self) -> Dim:
        block = self.root.block
        if not self.free or block == 1:
            return joined([Piece(self.size, constant=self.constant)])
        return joined([Piece(self.size // block), Piece(block, self, 1)])

    def fits(self, other: Unknown) -> bool:
        return isinstance(other, _Matrix) and self.block == other.block


class _Squares(Value):
    """Squares of numbers in some bases: good for sums along whole axes only."""


class _Bases(Equations):
    """The bases of a function's values: 0 is 0 in any. All layers of a stack turn alike."""

    layered, opposite = False, 1

    def __init__(self) -> None:
        super().__init__()
        self.rules = _rules()

    def unknown(self, path: str, axis: int, size: int, stack: tuple[int, ...], leaf: Leaf) -> _Matrix:
        return _Matrix(path, axis, size, _constant(leaf, axis))

    def usable(self, unknown: _Matrix) -> bool:
        return unknown.root.block > 1

    def constant(self, x: ArrayLike) -> Value:
        known = np.size(x) == 1 and not isinstance(x, jax.core.Tracer)
        return Value.plain(np.shape(x), constant=True, nil=known and bool(np.all(np.asarray(x) == 0)))

    def cut(self, piece: Piece, outer: int) -> tuple[Piece, Piece]:
        """A matrix must stay within the second piece."""
        inner = piece.size // outer
        if piece.unknown is None:
            return piece._replace(size=outer), piece._replace(size=inner)
        root = piece.unknown.root
        if root.block % inner or inner == 1:
            self.fix_unknown(root)
        elif root.block != inner:
            root.block = inner
            self.changes += 1
        return Piece(outer), piece._replace(size=inner)

    def equated(self, pairs: Iterable[tuple[Dim, Dim]], power: int = 1) -> list[Dim]:
        return [joined(self._equal(x, y) for x, y in self.aligned(a, b)) for a, b in pairs]

    def _equal(self, a: Piece, b: Piece) -> Piece:
        if a.unknown is not None and b.unknown is not None:
            self.join(a.unknown, b.unknown)
            return a
        self.fix_dim((a, b))
        return Piece(a.size, constant=a.constant and b.constant)

    # -- scans: what is carried keeps its basis, and may vary where its first value is constant ------------------------
    def carried(self, value: Value) -> Value:
        return _varying(self._unsquared(value))

    def layer(self, value: Value) -> Value:
        self.fix(value, [0])
        value = self._unsquared(value)
        return Value(value.dims[1:], value.nil)

    def again(self, before: Value, after: Value) -> Value:
        self.equated(zip(before.dims, self._unsquared(after).dims, strict=True))
        return before

    def stacked(self, value: Value, length: int) -> Value:
        return Value((*Value.plain([length]).dims, *self._unsquared(value).dims), value.nil)

    # -- rules ---------------------------------------------------------------------------------------------------------
    def simple(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        if eqn.primitive is p.mul_p and eqn.invars[0] is eqn.invars[1]:
            return self.square(eqn, values[:1])
        if eqn.primitive not in _of_squares():
            values = [self._unsquared(value) for value in values]
        return super().simple(eqn, values)

    def _unsquared(self, value: Value) -> Value:
        """For what is not known to be good with squares."""
        if isinstance(value, _Squares):
            self.fix(value)
        return Value(value.dims, value.nil)

    def pointwise(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Constant where all operands are."""
        for value in values:
            self.fix(value)
        full = [v.dims for v in self.full(values, shape_of(eqn.outvars[0]))]
        constant = [all(x.constant for dims in full for x in dims[i]) for i in range(len(shape_of(eqn.outvars[0])))]
        shape = zip(shape_of(eqn.outvars[0]), constant, strict=True)
        return [Value(tuple((Piece(n, constant=c),) if n != 1 else () for n, c in shape))]

    def select(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """A sum, times what selects the terms."""
        (chosen,) = self.sum(eqn, values[1:])
        (out,) = self.product(eqn, [chosen, values[0]])
        return [Value(out.dims, chosen.nil)]

    def product(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        a, b = self.full(values, shape_of(eqn.outvars[0]))
        pairs = (self.aligned(d, e) for d, e in zip(a.dims, b.dims, strict=True))
        return [Value(tuple(joined(self._times(x, y) for x, y in axis) for axis in pairs), a.nil or b.nil)]

    def _times(self, x: Piece, y: Piece) -> Piece:
        """One factor in a basis, the other constant along there."""
        if x.unknown is not None and y.unknown is not None:  # a gain of ones turns out to be constant in the next round
            for gain, other in ((x, y), (y, x)):
                if gain.unknown.root is gain.unknown and gain.unknown.constant:
                    self.fix_unknown(gain.unknown)
                    return other
        for turned, other in ((x, y), (y, x)):
            if turned.unknown is not None and other.constant:
                return turned
        self.fix_dim((x, y))
        return Piece(x.size, constant=x.constant and y.constant)

    def square(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        (value,) = values
        if isinstance(value, _Squares) or eqn.params.get("y", 2) != 2:
            return self.pointwise(eqn, values)
        return [(_Squares if value.unknowns else Value)(value.dims, value.nil)]

    def reduce_sum(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        (value,) = values
        if not isinstance(value, _Squares):
            return moving(self, eqn, values)
        rest = Value(tuple(dim for i, dim in enumerate(value.dims) if i not in eqn.params["axes"]), value.nil)
        self.fix(rest)
        return [rest]

    def extreme(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """A maximum along some axes is constant where its operand is."""
        self.fix(values[0])
        return moving(self, eqn, values)

    def update(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """A piece of an array replaced: one basis for both, along axes that are replaced whole."""
        operand, update = values[:2]
        sizes = zip(operand.shape, update.shape, strict=True)
        flow = kept(eqn, [i for i, (n, m) in enumerate(sizes) if n != m], 2)
        if operand.nil:
            flow = Flow([places[1:] for places in flow.out])
        return [_varying(result) for result in self.moved(eqn, values, flow)]


def _varying(value: Value) -> Value:
    """The same, not known to be constant."""
    return Value(tuple(joined(piece._replace(constant=False) for piece in dim) for dim in value.dims))


def _constant(leaf: Leaf, axis: int) -> bool:
    """Whether a vector (or a stack of them) has one value along an axis."""
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) or leaf.ndim > 3 or leaf.size > 1 << 20:
        return False
    return bool(np.all(np.ptp(np.asarray(leaf, np.float32), axis=axis) == 0))


@functools.cache
def _of_squares() -> frozenset[Primitive]:
    """The primitives that take squares and keep their meaning."""
    return frozenset((p.reduce_sum_p, p.convert_element_type_p, p.copy_p, p.square_p, p.integer_pow_p))


@functools.cache
def _rules() -> dict[Primitive | None, Rule[Value]]:
    functions = (
        p.max_p, p.min_p, p.pow_p, p.exp_p, p.exp2_p, p.log_p, p.log1p_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p, p.tanh_p,
        p.logistic_p, p.erf_p, p.abs_p, p.sign_p, p.sin_p, p.cos_p, p.rem_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.eq_p,
        p.ne_p, p.and_p, p.or_p, p.not_p, p.floor_p, p.ceil_p, p.round_p, p.is_finite_p,
    )  # fmt: skip
    return {
        **rules(),
        **dict.fromkeys(functions, _Bases.pointwise),
        p.select_n_p: _Bases.select,
        p.mul_p: _Bases.product,
        **dict.fromkeys((p.square_p, p.integer_pow_p), _Bases.square),
        p.reduce_sum_p: _Bases.reduce_sum,
        **dict.fromkeys((p.reduce_max_p, p.reduce_min_p), _Bases.extreme),
        p.dynamic_update_slice_p: _Bases.update,
        p.dot_general_p: moving,
    }
