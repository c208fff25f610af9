"""`Equations`: unknowns on the axes of parameters, and the equations that a function's trace gives.

Each axis of each parameter gets an unknown: a scale, a matrix. Evaluating the jaxpr on those describes every value
along every axis, and each operation says that two unknowns are one, or that one is trivial (*fixed*): the terms of a
sum, for example, are described alike. The jaxpr is evaluated until nothing changes. The other unknowns are free.

Where an equation could say more than that, an unknown is fixed: a solution may be missed, none is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jaxquant.core.paths import Leaf, Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.transform.analysis.axes import aligned, factored, size_of
from jaxquant.transform.analysis.flow import Flow, Place, flows
from jaxquant.transform.analysis.walk import Rule, Walk
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.primitives import marked_varying, shape_of, used_by
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.trace import Traced, trace

__all__ = ["Dim", "Equations", "Parameter", "Piece", "Unknown", "Value", "joined", "rules", "traced_for"]

U = TypeVar("U", bound="Unknown")


class Unknown:
    """An unknown of one axis of one parameter.

    Unknowns that turn out to be one point at each other: this one is ``parent ** turn``, and its root stands for all.

    Attributes:
      path, axis: which, the axis counted from the end.
      size: of the axis.
      stack: sizes of the leading axes that scans have consumed.
      fixed: whether it is trivial, which the root says.
    """

    def __init__(self, path: str, axis: int, size: int, stack: tuple[int, ...] = ()):
        self.path, self.axis, self.size, self.stack = path, axis, size, stack
        self.parent, self.turn, self.fixed = self, 1, False

    @property
    def root(self) -> Self:
        """The one that stands for all that are one with this."""
        return self if self.parent is self else self.parent.root

    @property
    def power(self) -> int:
        """+1 or -1: this one is ``root ** power``."""
        return 1 if self.parent is self else self.turn * self.parent.power

    @property
    def free(self) -> bool:
        """Whether it may be anything, as far as is known."""
        return not self.root.fixed

    @property
    def pieces(self) -> Dim:
        """How it describes its axis."""
        return joined([Piece(self.size, self, 1)])

    def fits(self, other: Unknown) -> bool:
        """Whether two roots can be one. One that is the same for all layers fits one of each layer."""
        shared = min(len(self.stack), len(other.stack))
        return self.size == other.size and self.stack[:shared] == other.stack[:shared]


class Piece(NamedTuple):
    """A piece of an axis.

    Attributes:
      size: entries.
      unknown: the `Unknown` that describes the value along here; None if none does.
      stride: entry i belongs to entry ``i * stride`` of the unknown, and whatever the other pieces of that add.
      constant: whether the value is the same all along here.
    """

    size: int
    unknown: Any = None
    stride: int = 0
    constant: bool = False


Dim = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """The description of a value.

    Attributes:
      dims: the pieces of each axis.
      nil: whether no unknown can change it: it is 0, say.
    """

    dims: tuple[Dim, ...]
    nil: bool = False

    @classmethod
    def plain(cls, shape: Iterable[int], *, constant: bool = False, nil: bool = False) -> Value:
        """A value that no unknown describes."""
        return Value(tuple((Piece(n, constant=constant),) if n != 1 else () for n in shape), nil)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(map(size_of, self.dims))

    @property
    def unknowns(self) -> set[Unknown]:
        """The unknowns that describe it."""
        return {piece.unknown for dim in self.dims for piece in dim if piece.unknown is not None}


@dataclasses.dataclass(frozen=True)
class Parameter(Value):
    """A parameter, or one layer of a stack of them, before any operation."""

    path: str = ""
    leaf: Leaf | None = None
    stack: tuple[int, ...] = ()


def joined(pieces: Iterable[Piece]) -> Dim:
    """The pieces of one axis, neighbours that belong together as one."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else Piece(0, stride=-1)
        if piece.size == 1:
            continue
        if last == piece._replace(size=last.size, stride=piece.stride * piece.size):
            out[-1] = piece._replace(size=last.size * piece.size)
        else:
            out.append(piece)
    return tuple(out)


class Equations(Walk[Value], Generic[U]):
    """The unknowns of a function, and what is known of them.

    Attributes:
      layered: whether each layer of a stack has an unknown of its own.
      opposite: the power that joins contracted axes.
      unknown: ``(path, axis, size, stack, leaf) ->`` a new one.
      cut: ``(piece, outer) ->`` two pieces, the first with ``outer`` entries.
      equated: ``(pairs of axes, power) ->`` what describes each axis, if one is the power of the other.
      product: the rule of an elementwise product.
    """

    layered: ClassVar[bool]
    opposite: ClassVar[int]
    unknown: Callable[[str, int, int, tuple[int, ...], Leaf], U]
    cut: Callable[[Piece, int], tuple[Piece, Piece]]
    equated: Callable[..., list[Dim]]
    product: Callable[[JaxprEqn, list[Value]], list[Value]]

    def __init__(self) -> None:
        self.unknowns: dict[tuple[str, int, int], U] = {}  # by path, axis and number of stacked axes
        self.changes = 0

    # -- solving -------------------------------------------------------------------------------------------------------
    def solve(self, traced: Traced) -> None:
        """Evaluates the jaxpr until nothing new is learned."""
        before = -1
        while self.changes != before:
            before = self.changes
            inputs = [self.parameter(path, leaf) for path, leaf in traced.params.items()]
            inputs += [Value.plain(a.shape) for a in traced.arrays]
            for value in self.run(traced.jaxpr, inputs):
                self.fix(value)

    def parameter(self, path: str, leaf: Leaf, stack: tuple[int, ...] = ()) -> Value:
        """A parameter, or one layer of it: every axis with its unknown, if it is of floats."""
        shape = tuple(leaf.shape)[len(stack) :]
        if not is_float(leaf) or isinstance(leaf, QTensor):
            return Value.plain(shape)
        dims = []
        for axis in range(-len(shape), 0):
            key = path, axis, len(stack)
            if key not in self.unknowns:
                self.unknowns[key] = self.unknown(path, axis, shape[axis], stack, leaf)
            dims.append(self.unknowns[key].pieces)
        return Parameter(tuple(dims), path=path, leaf=leaf, stack=stack)

    def usable(self, unknown: U) -> bool:
        """Whether a free unknown can be part of a solution."""
        return unknown.size > 1

    def solutions(self, plan: Plan) -> Iterator[tuple[U, list[U]]]:
        """In the order of the plan: a free unknown of an axis that a weight contracts, and all that are one with it."""
        groups: dict[Unknown, list[U]] = {}
        for unknown in self.unknowns.values():
            if unknown.free and self.usable(unknown):
                groups.setdefault(unknown.root, []).append(unknown)
        for item in plan.items:
            for axis in item.reduce_axes:
                unknown = self.unknowns.get((item.path, axis, item.stacked if self.layered else 0))
                if unknown is not None and unknown.root in groups:
                    yield unknown, groups.pop(unknown.root)

    # -- what is learned -----------------------------------------------------------------------------------------------
    def fix_unknown(self, unknown: Unknown | None) -> None:
        """It is trivial."""
        if unknown is not None and unknown.free:
            unknown.root.fixed = True
            self.changes += 1

    def fix_dim(self, dim: Dim) -> None:
        """All of an axis are."""
        for piece in dim:
            self.fix_unknown(piece.unknown)

    def fix(self, value: Value, axes: Iterable[int] | None = None) -> None:
        """All of these axes are, or of all axes."""
        for i in range(len(value.dims)) if axes is None else axes:
            self.fix_dim(value.dims[i])

    def join(self, a: Unknown, b: Unknown, power: int = 1) -> None:
        """``a = b ** power``."""
        ra, rb, turn = a.root, b.root, a.power * power * b.power
        if ra is rb:
            if turn != 1:
                self.fix_unknown(a)
        elif ra.fixed or rb.fixed or not ra.fits(rb):
            self.fix_unknown(a)
            self.fix_unknown(b)
        else:
            if len(ra.stack) < len(rb.stack):
                ra, rb = rb, ra
            ra.parent, ra.turn = rb, turn
            self.changes += 1

    def aligned(self, a: Dim, b: Dim) -> list[tuple[Piece, Piece]]:
        """Two descriptions of one axis, cut at the same places; fixed if they cannot be."""
        found = aligned(a, b, self.cut)
        if found is None:
            self.fix_dim((*a, *b))
            return [(Piece(size_of(a)), Piece(size_of(a)))]
        return found

    def merged(self, a: Piece, b: Piece) -> Piece:
        """Two neighbours as one piece."""
        self.fix_dim((a, b))
        return Piece(a.size * b.size)

    # -- rules ---------------------------------------------------------------------------------------------------------
    def other(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        for value in values:
            self.fix(value)
        return [Value.plain(shape_of(v)) for v in eqn.outvars]

    def pointwise(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Any function of each element."""
        return self.other(eqn, values)

    def moved(self, eqn: JaxprEqn, values: list[Value], flow: Flow) -> list[Value]:
        """A linear operation that moves axes: fixes the unknowns of each axis that it does not keep."""
        kept = {place for places in (*flow.out, *flow.contracted) for place in places}
        for k, value in enumerate(values):
            self.fix(value, [i for i in range(len(value.dims)) if (k, i) not in kept])

        def at(place: Place) -> Dim:
            operand, axis = place
            return values[operand].dims[axis]

        self.equated([(at(a), at(b)) for a, b in flow.contracted], self.opposite)
        dims = {j: at(places[0]) for j, places in enumerate(flow.out) if places}
        for n in range(1, len(values)):
            more = {j: at(places[n]) for j, places in enumerate(flow.out) if n < len(places)}
            dims.update(zip(more, self.equated([(dims[j], more[j]) for j in more]), strict=True))
        arrays, plain = [v for v in values if v.dims], [Value.plain(shape_of(v)).dims for v in eqn.outvars]
        nil = len(arrays) == 1 and arrays[0].nil
        return [Value(tuple(dims.get(j, dim) for j, dim in enumerate(result)), nil) for result in plain]

    def full(self, values: Iterable[Value], shape: tuple[int, ...]) -> list[Value]:
        """Operands in the shape of the result: scalars and axes of size 1 are repeated."""
        out, repeated = [], Value.plain(shape, constant=True).dims
        for value in values:
            dims = value.dims or ((),) * len(shape)
            out.append(Value(tuple(dim or r for dim, r in zip(dims, repeated, strict=True)), value.nil))
        return out

    def same(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Linear, each element for itself: each result is described as its operand."""
        return values[: len(eqn.outvars)]

    def cast(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        return values if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else self.pointwise(eqn, values)

    def sum(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """All terms are described alike; a nil one fits any."""
        return [self.alike(self.full(values, shape_of(eqn.outvars[0])))]

    def either(self, index: Value, results: list[Value]) -> Value:
        """The results of all branches are described alike; a parameter that a branch returns stays as it is."""
        for value in (index, *(r for r in results if isinstance(r, Parameter))):
            self.fix(value)
        return self.alike([Value(r.dims, r.nil) for r in results])

    def alike(self, values: list[Value]) -> Value:
        """One description of values of one shape; a nil one fits any."""
        first, *rest = [v for v in values if not v.nil] or values[:1]
        dims = first.dims
        for term in rest:
            dims = tuple(self.equated(zip(dims, term.dims, strict=True)))
        return Value(dims, first.nil)

    def quotient(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        self.fix(values[1])
        (result,) = self.product(eqn, values)
        return [Value(result.dims, values[0].nil)]

    def broadcast(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """New axes, and repeated ones, are constant."""
        dims = list(Value.plain(shape_of(eqn.outvars[0]), constant=True).dims)
        for i, dim in zip(eqn.params["broadcast_dimensions"], values[0].dims, strict=True):
            dims[i] = dim or dims[i]
        return [Value(tuple(dims), values[0].nil)]

    def reshape(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        shape = shape_of(eqn.outvars[0])
        if 0 in shape or (eqn.primitive is p.reshape_p and eqn.params["dimensions"] is not None):
            return self.other(eqn, values)
        dims = factored(values[0].dims, shape, self.cut, self.merged)
        return [Value(tuple(map(joined, dims)), values[0].nil)]

    def pad(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        return moving(self, eqn, values[:1]) if values[1].nil else self.other(eqn, values)


def moving(equations: Equations, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """The rule of the primitives that `flows` has."""
    return equations.moved(eqn, values, flows()[eqn.primitive](eqn))


@functools.cache
def rules() -> dict[Primitive | None, Rule[Value]]:
    """The rules that are the same whatever is unknown."""
    split = used_by(lax.split)
    traced = map(used_by, (checkpoint_name, lax.stop_gradient, lax.optimization_barrier, marked_varying))
    unchanged = [p.neg_p, p.copy_p, p.real_p, p.reduce_precision_p, p.sharding_constraint_p]
    return {
        **dict.fromkeys((p.cumsum_p, split, p.rev_p, p.concatenate_p, p.transpose_p, p.gather_p), moving),
        **dict.fromkeys((p.slice_p, p.dynamic_slice_p), moving),
        **dict.fromkeys((*unchanged, *traced), Equations.same),
        p.convert_element_type_p: Equations.cast,
        **dict.fromkeys((p.add_p, p.add_jaxvals_p, p.sub_p), Equations.sum),
        p.div_p: Equations.quotient,
        p.broadcast_in_dim_p: Equations.broadcast,
        **dict.fromkeys((p.reshape_p, p.squeeze_p), Equations.reshape),
        p.pad_p: Equations.pad,
    }


def traced_for(
    function: str,
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> Traced:
    """The trace of a function that an analysis of a plan looks at."""
    check_plan(function, plan, leaves_with_paths(params)[0])
    return trace(function, fn, params, args, kwargs)
