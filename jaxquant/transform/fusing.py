"""`rotation_groups`: which axes of parameters one orthogonal matrix can turn together, by a function's trace.

Write every value of the residual stream in another orthogonal basis: what writes to it (the embedding, projections)
gets the matrix on its outputs, what reads it (queries, gates, the head) on its inputs, an RMS norm without gains does
not notice, and the function stays what it is. So it does for the values of an attention, head by head, and the
projection behind it. Where a matrix may go follows from the trace alone, as with the scales of
`jaxquant.transform.pairs`:

Each axis of each parameter gets an unknown orthogonal matrix. Evaluating the jaxpr on those gives the basis of every
value along every axis, and each operation equates bases: those of the terms of a sum, and of contracted axes. A product
with what is constant along an axis keeps the basis there; the sum of squares along an axis has none; everything else
wants the basis as it was, and so do the function's results. What is left over may be any orthogonal matrix. A reshape
that cuts an axis leaves one matrix for all pieces of the inner length. A group may be missed, never wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.ptq.bases import Rotation
from jaxquant.transform.pairs import ScalePair, body_of, shape_of
from jaxquant.transform.paths import leaves_with_paths
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.trace import trace

__all__ = ["RotationGroup", "fold_gains", "rotate", "rotation_groups"]


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
        """A random orthogonal matrix [size, size] as flat as `jaxquant.ptq.Rotation`'s: Hadamard where there is one."""
        return Rotation.random(key, self.size).inputs(jnp.eye(self.size))


def fold_gains(params: Any, pairs: Iterable[ScalePair]) -> Any:
    """The gains of norms multiplied into the weights that read them, and 1 in their place. The function stays.

    Args:
      params: float parameters.
      pairs: from `scale_pairs`, with a plan of all weights that should take gains. Those count whose only source is a
        vector: norms without a bias.

    Returns:
      The same tree.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> fn = lambda p, x: (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["gain"]) @ p["w"]
      >>> params, x = {"gain": jnp.array([[2.0, 3.0]]), "w": jnp.ones((2, 2))}, jnp.ones((1, 2))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.OpSpec(jq.QuantSpec("int8")))])
      >>> jq.fold_gains(params, jq.scale_pairs(fn, plan, params, x))["w"].tolist()
      [[2.0, 2.0], [3.0, 3.0]]
    """
    leaves, treedef = leaves_with_paths(params)
    for pair in pairs:
        if len(pair.sources) != 1 or pair.sources[0].power > 0:
            continue
        source = pair.sources[0]
        gain = jnp.asarray(leaves[source.path])
        if gain.size != math.prod(pair.stack) * pair.channels:
            continue
        flat = gain.reshape(*pair.stack, pair.channels)
        for member in pair.sinks:
            w = jnp.asarray(leaves[member.path])
            shape = [*w.shape[: member.stacked], *[1] * (w.ndim - member.stacked)]
            shape[member.axis] = pair.channels
            leaves[member.path] = (w * flat.reshape(shape)).astype(w.dtype)
        leaves[source.path] = jnp.ones_like(gain)
    return jax.tree.unflatten(treedef, leaves.values())


def rotation_groups(
    fn: Callable[..., Any], plan: Plan, params: Any, *args: Any, **kwargs: Any
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
      >>> print(*jq.rotation_groups(fn, plan, params, x))
      a[-1] -> b[-2] (8 channels)

    Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), figures 2 and 3, and Liu et al. 2024 (SpinQuant,
      arXiv:2405.16406), figure 1: R1 is the group of the residual stream, R2 those of the values. There they are named
      by hand; here they are the solutions of the trace's equations.
    """
    check_plan("rotation_groups", plan, leaves_with_paths(params)[0])
    traced = trace("rotation_groups", fn, params, args, kwargs)
    found = _Bases(leaves_with_paths(params)[0])
    while True:
        before = found.changes
        inputs = [found.parameter(path, tuple(leaf.shape)) for path, leaf in traced.params.items()]
        inputs += [_Value.plain(a.shape) for a in traced.arrays]
        for value in found.run(traced.jaxpr, inputs):
            found.fix(value)
        if found.changes == before:
            return found.groups(plan)


def rotate(params: Any, group: RotationGroup, matrix: jax.Array) -> Any:
    """Turns every member of a group by an orthogonal matrix R: ``w[.., j] = sum_i w[.., i] R[i, j]`` along its axis.

    Args:
      params: float parameters.
      group: from `rotation_groups`.
      matrix: orthogonal, [group.size, group.size].

    Returns:
      The same tree. The function of them is the same, up to rounding in float.

    Raises:
      QuantError: if the matrix has another shape, or a member is quantized already.

    Gradient: with respect to params and matrix.
    """
    if tuple(jnp.shape(matrix)) != (group.size, group.size):
        todo = f"Pass one of shape {(group.size, group.size)}"
        raise quant_error("rotate", "the matrix does not fit the group", todo=todo, shape=jnp.shape(matrix))
    leaves, treedef = leaves_with_paths(params)
    for path, axis in (*group.sinks, *group.others):
        w = leaves[path]
        if isinstance(w, QTensor):
            todo = "Rotate the float params, then quantize"
            raise quant_error("rotate", "the parameter is quantized already", todo=todo, path=path)
        last = jnp.moveaxis(jnp.asarray(w), axis, -1)
        pieces = last.reshape(*last.shape[:-1], -1, group.size)
        turned = jnp.matmul(pieces, matrix.astype(jnp.float32), precision="highest").reshape(last.shape)
        leaves[path] = jnp.moveaxis(turned, -1, axis).astype(w.dtype)
    return jax.tree.unflatten(treedef, leaves.values())


# -- unknowns ----------------------------------------------------------------------------------------------------------


class _Unknown:
    """The matrix of one axis of one parameter: its parent's, or its own, or the identity (``fixed``).

    Attributes:
      block: its size; the axis is so many or a multiple.
      constant: whether the parameter has one value all along the axis.
    """

    def __init__(self, path: str, axis: int, size: int, constant: bool):
        self.path, self.axis, self.size, self.constant = path, axis, size, constant
        self.parent, self.block, self.fixed = self, size, False

    def root(self) -> _Unknown:
        node = self
        while node.parent is not node:
            node = node.parent
        return node


class _Piece(NamedTuple):
    """A piece of an axis: an unknown's basis; or none, and whether the value is constant along here."""

    size: int
    unknown: _Unknown | None = None
    constant: bool = False


_Dim = tuple[_Piece, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    """The bases of a value.

    Attributes:
      dims: the pieces of each axis.
      nil: whether it is zero, in any basis.
      squared: whether it holds squares of numbers in those bases, which are good for sums along whole axes only.
    """

    dims: tuple[_Dim, ...]
    nil: bool = False
    squared: bool = False

    @classmethod
    def plain(cls, shape: Iterable[int], *, constant: bool = False, nil: bool = False) -> _Value:
        return cls(tuple((_Piece(n, None, constant),) if n != 1 else () for n in shape), nil)


def _joined(pieces: Iterable[_Piece]) -> _Dim:
    """Neighbours without a basis put together, pieces of size 1 left out."""
    out: list[_Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if piece.size == 1:
            continue
        if last is not None and last.unknown is None and piece[1:] == last[1:]:
            out[-1] = last._replace(size=last.size * piece.size)
        else:
            out.append(piece)
    return tuple(out)


class _Bases:
    """The unknowns, and what is known of them."""

    def __init__(self, leaves: Mapping[str, Any]):
        self.leaves = leaves
        self.unknowns: dict[tuple[str, int], _Unknown] = {}
        self.changes = 0

    def parameter(self, path: str, shape: tuple[int, ...]) -> _Value:
        """A parameter (or one layer of a stack of them), every axis with its unknown."""
        leaf = self.leaves[path]
        if not is_float(leaf) or isinstance(leaf, QTensor):
            return _Value.plain(shape)
        dims = []
        for axis in range(-len(shape), 0):
            unknown = self.unknowns.get((path, axis))
            if unknown is None:
                unknown = _Unknown(path, axis, shape[axis], _constant(leaf, axis))
                self.unknowns[path, axis] = unknown
            dims.append(_joined(self.pieces(unknown)))
        return _Value(tuple(dims))

    def pieces(self, unknown: _Unknown) -> Iterator[_Piece]:
        root = unknown.root()
        if root.fixed or root.block == 1:
            yield _Piece(unknown.size, None, unknown.constant)
        else:
            yield _Piece(unknown.size // root.block)
            yield _Piece(root.block, unknown)

    def fix_unknown(self, unknown: _Unknown | None) -> None:
        if unknown is not None and not unknown.root().fixed:
            unknown.root().fixed = True
            self.changes += 1

    def fix(self, value: _Value, axes: Iterable[int] | None = None) -> None:
        """The basis as it was along these axes (all of them)."""
        for i in range(len(value.dims)) if axes is None else axes:
            for piece in value.dims[i]:
                self.fix_unknown(piece.unknown)

    def shrink(self, unknown: _Unknown, block: int) -> None:
        """At most this many channels are mixed."""
        root = unknown.root()
        if root.block % block or block == 1:
            self.fix_unknown(unknown)
        elif root.block != block:
            root.block = block
            self.changes += 1

    def join(self, a: _Unknown, b: _Unknown) -> None:
        """One matrix for both."""
        ra, rb = a.root(), b.root()
        if ra is rb:
            return
        if ra.fixed or rb.fixed or ra.block != rb.block:
            self.fix_unknown(a)
            self.fix_unknown(b)
        else:
            ra.parent = rb
            self.changes += 1

    def cut(self, piece: _Piece, outer: int) -> tuple[_Piece, _Piece]:
        """In two, the first with ``outer`` entries: what is mixed must stay within the second."""
        inner = piece.size // outer
        if piece.unknown is not None:
            self.shrink(piece.unknown, inner)
            return _Piece(outer), _Piece(inner, piece.unknown)
        return piece._replace(size=outer), piece._replace(size=inner)

    def aligned(self, a: _Dim, b: _Dim) -> list[tuple[_Piece, _Piece]]:
        """Two descriptions of one axis cut at the same places; where they cannot be, without any basis."""
        left, right, out = list(a), list(b), []
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x.size > y.size and x.size % y.size == 0:
                x, rest = self.cut(x, y.size)
                left.insert(0, rest)
            elif y.size > x.size and y.size % x.size == 0:
                y, rest = self.cut(y, x.size)
                right.insert(0, rest)
            elif x.size != y.size:
                for piece in (x, y, *left, *right):
                    self.fix_unknown(piece.unknown)
                return [*out, *[(_Piece(p.size), _Piece(p.size)) for p in (x, *left)]]
            out.append((x, y))
        return out

    def equal(self, a: _Piece, b: _Piece) -> _Piece:
        """One basis for both."""
        if a.unknown is not None and b.unknown is not None:
            self.join(a.unknown, b.unknown)
            return a
        self.fix_unknown(a.unknown)
        self.fix_unknown(b.unknown)
        return _Piece(a.size, None, a.constant and b.constant)

    def groups(self, plan: Plan) -> tuple[RotationGroup, ...]:
        members: dict[_Unknown, list[tuple[str, int]]] = {}
        for (path, axis), unknown in self.unknowns.items():
            root = unknown.root()
            if not root.fixed and root.block > 1:
                members.setdefault(root, []).append((path, axis))
        out = []
        for item in plan.items:
            for axis in item.reduce_axes:
                unknown = self.unknowns.get((item.path, axis))
                group = members.pop(unknown.root(), None) if unknown is not None else None
                if unknown is None or group is None:
                    continue
                sinks = tuple(m for m in group if m[0] in plan and m[1] in plan[m[0]].reduce_axes)
                others = tuple(m for m in group if m not in sinks)
                if others:
                    out.append(RotationGroup(sinks, others, unknown.root().block))
        return tuple(out)

    # -- evaluation ----------------------------------------------------------------------------------------------------
    def run(self, closed: ClosedJaxpr, inputs: list[_Value]) -> list[_Value]:
        jaxpr = closed.jaxpr
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for v, c in zip(jaxpr.constvars, closed.consts, strict=True):
            env[v] = _Value.plain(v.aval.shape, nil=_zero(c))

        def read(v: Any) -> _Value:
            if isinstance(v, Literal):
                return _Value.plain(np.shape(v.val), constant=True, nil=_zero(v.val))
            return env[v]

        for eqn in jaxpr.eqns:
            values, name, inner = [read(v) for v in eqn.invars], str(eqn.primitive), body_of(eqn)
            if inner is not None:
                results = self.run(inner, values)
            elif name == "scan":
                results = self.scan(eqn, values)
            elif name == "mul" and eqn.invars[0] is eqn.invars[1]:
                results = _square(self, eqn, values[:1])
            else:
                for value in values:
                    if value.squared and name not in _OF_SQUARES:
                        self.fix(value)
                results = _RULES.get(name, _other)(self, eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def scan(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """What is carried keeps its basis; what is scanned over has one for all layers."""
        p = eqn.params
        consts, carried = p["num_consts"], p["num_consts"] + p["num_carry"]
        inner = []
        for i, value in enumerate(values):
            if value.squared:
                self.fix(value)
            if i < consts:
                inner.append(value)
            elif i < carried:
                inner.append(_Value(tuple(tuple(piece._replace(constant=False) for piece in d) for d in value.dims)))
            else:
                self.fix(value, [0])
                inner.append(dataclasses.replace(value, dims=value.dims[1:]))
        results = self.run(p["jaxpr"], inner)
        for before, after in zip(inner[consts:carried], results, strict=False):
            if after.squared:
                self.fix(after)
            for a, b in zip(before.dims, after.dims, strict=True):
                for x, y in self.aligned(a, b):
                    self.equal(x, y)
        length = ((_Piece(p["length"]),),)
        rest = [dataclasses.replace(v, dims=length + v.dims) for v in results[carried - consts :]]
        return [*inner[consts:carried], *rest]


def _constant(leaf: Any, axis: int) -> bool:
    """Whether a vector (or a stack of them) has one value along an axis."""
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) or leaf.ndim > 3 or leaf.size > 1 << 20:
        return False
    return bool(np.all(np.ptp(np.asarray(leaf, np.float32), axis=axis) == 0))


def _zero(x: Any) -> bool:
    return np.size(x) == 1 and bool(np.all(np.asarray(x) == 0))


def _other(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Anything: the basis as it was."""
    for value in values:
        bases.fix(value)
    return [_Value.plain(v.aval.shape) for v in eqn.outvars]


def _same(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    return values[: len(eqn.outvars)]


def _full(values: Iterable[_Value], shape: tuple[int, ...]) -> list[_Value]:
    """Operands in the shape of the result: what is repeated is constant."""
    out = []
    for value in values:
        dims = value.dims if value.dims else ((),) * len(shape)
        filled = (dim or ((_Piece(n, None, True),) if n != 1 else ()) for dim, n in zip(dims, shape, strict=True))
        out.append(dataclasses.replace(value, dims=tuple(filled)))
    return out


def _each(
    bases: _Bases, a: _Value, b: _Value, rule: Callable[[_Piece, _Piece], _Piece]
) -> tuple[_Dim, ...]:  # fmt: skip
    return tuple(
        _joined(rule(x, y) for x, y in bases.aligned(d, e)) for d, e in zip(a.dims, b.dims, strict=True)
    )  # fmt: skip


def _pointwise(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """A function of each element: constant where all operands are."""
    for value in values:
        bases.fix(value)
    shape = shape_of(eqn)
    constant = [all(p.constant for v in _full(values, shape) for p in v.dims[i]) for i in range(len(shape))]
    dims = tuple((_Piece(n, None, c),) if n != 1 else () for n, c in zip(shape, constant, strict=True))
    return [_Value(dims) for _ in eqn.outvars]


def _sum(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """All terms in one basis; zeros are in any."""
    values = _full(values, shape_of(eqn))
    terms = [v for v in values if not v.nil] or values[:1]
    out = terms[0]
    for other in terms[1:]:
        out = _Value(_each(bases, out, other, bases.equal))
    return [dataclasses.replace(out, nil=out.nil and len(terms) == 1)]


def _select(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    (chosen,) = _sum(bases, eqn, values[1:])
    (which,) = _full(values[:1], shape_of(eqn))
    return [_Value(_product_dims(bases, chosen, which), chosen.nil)]


def _product_dims(bases: _Bases, a: _Value, b: _Value) -> tuple[_Dim, ...]:
    """One factor in a basis, the other constant along there."""

    def rule(x: _Piece, y: _Piece) -> _Piece:
        if x.unknown is not None and y.unknown is not None:  # a gain of ones turns out to be constant in the next round
            for u in (x.unknown, y.unknown):
                if u.root() is u and u.constant:
                    bases.fix_unknown(u)
                    return x if u is y.unknown else y
        for u, other in ((x, y), (y, x)):
            if u.unknown is not None and other.constant:
                return u
        bases.fix_unknown(x.unknown)
        bases.fix_unknown(y.unknown)
        return _Piece(x.size, None, x.constant and y.constant)

    return _each(bases, a, b, rule)


def _product(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    a, b = _full(values, shape_of(eqn))
    return [_Value(_product_dims(bases, a, b), a.nil or b.nil)]


def _quotient(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    bases.fix(values[1])
    return _product(bases, eqn, values)


def _square(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    if values[0].squared or eqn.params.get("y", 2) != 2:
        return _pointwise(bases, eqn, values)
    squared = any(p.unknown is not None for dim in values[0].dims for p in dim)
    return [dataclasses.replace(values[0], squared=squared)]


def _reduce_sum(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    axes, (value,) = eqn.params["axes"], values
    rest = [i for i in range(len(value.dims)) if i not in axes]
    bases.fix(value, rest if value.squared else axes)
    return [_Value(tuple(value.dims[i] for i in rest), value.nil)]


def _reduce(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    for value in values:
        bases.fix(value)
    rest = [i for i in range(len(values[0].dims)) if i not in eqn.params["axes"]]
    return [_Value(tuple(values[0].dims[i] for i in rest)) for _ in eqn.outvars]


def _along(name: str) -> Callable[..., list[_Value]]:
    """Something linear along the axes of this parameter."""

    def rule(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
        axes = eqn.params[name]
        axes = {axes} if isinstance(axes, int) else set(axes)
        bases.fix(values[0], axes)
        dims, out = values[0].dims, []
        for v in eqn.outvars:
            shape = tuple(v.aval.shape)
            plain = _Value.plain(shape).dims
            out.append(_Value(tuple(plain[i] if i in axes else dims[i] for i in range(len(shape))), values[0].nil))
        return out

    return rule


def _transpose(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    return [dataclasses.replace(values[0], dims=tuple(values[0].dims[i] for i in eqn.params["permutation"]))]


def _broadcast(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    dims = list(_Value.plain(shape_of(eqn), constant=True).dims)
    for i, dim in zip(eqn.params["broadcast_dimensions"], values[0].dims, strict=True):
        if dim:
            dims[i] = dim
    return [_Value(tuple(dims), values[0].nil)]


def _reshape(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    if eqn.params.get("dimensions") is not None and str(eqn.primitive) == "reshape":
        return _other(bases, eqn, values)
    pieces = [piece for dim in values[0].dims for piece in dim]
    dims = []
    for n in shape_of(eqn):
        dim: list[_Piece] = []
        while n > 1:
            piece = pieces.pop(0)
            if n % piece.size == 0:
                dim.append(piece)
                n //= piece.size
            elif piece.size % n == 0:
                first, rest = bases.cut(piece, n)
                dim.append(first)
                pieces.insert(0, rest)
                n = 1
            else:
                bases.fix_unknown(piece.unknown)
                bases.fix_unknown(pieces[0].unknown)
                pieces[0] = _Piece(piece.size * pieces[0].size)
        dims.append(_joined(dim))
    return [_Value(tuple(dims), values[0].nil)]


def _cut(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Slices and paddings: the basis as it was along an axis whose size changes."""
    dims, shape = values[0].dims, shape_of(eqn)
    changed = [i for i, n in enumerate(shape) if n != math.prod(p.size for p in dims[i])]
    bases.fix(values[0], changed)
    if str(eqn.primitive) == "pad" and not values[1].nil:
        return _other(bases, eqn, values)
    plain = _Value.plain(shape).dims
    return [_Value(tuple(plain[i] if i in changed else dims[i] for i in range(len(shape))), values[0].nil)]


def _update(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """A piece of an array replaced: one basis for both, along axes that are replaced whole."""
    operand, update = values[:2]
    size = lambda dim: math.prod(p.size for p in dim)  # noqa: E731
    changed = [i for i, (d, e) in enumerate(zip(operand.dims, update.dims, strict=True)) if size(d) != size(e)]
    bases.fix(operand, changed)
    bases.fix(update, changed)
    plain, dims = _Value.plain(shape_of(eqn)).dims, []
    for i, (d, e) in enumerate(zip(operand.dims, update.dims, strict=True)):
        if i in changed:
            dims.append(plain[i])
        elif operand.nil:
            dims.append(tuple(piece._replace(constant=False) for piece in e))
        else:
            dims.append(_joined(bases.equal(x, y)._replace(constant=False) for x, y in bases.aligned(d, e)))
    return [_Value(tuple(dims))]


def _concatenate(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    axis, out = eqn.params["dimension"], values[0]
    for value in values:
        bases.fix(value, [axis])
    dims = list(out.dims)
    for other in values[1:]:
        for i in range(len(dims)):
            if i != axis:
                dims[i] = _joined(bases.equal(x, y) for x, y in bases.aligned(dims[i], other.dims[i]))
    dims[axis] = _Value.plain(shape_of(eqn)).dims[axis]
    return [_Value(tuple(dims))]


def _gather(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Whole rows of a table keep their basis."""
    table, p = values[0], eqn.params
    d = p["dimension_numbers"]
    sizes = [math.prod(q.size for q in dim) for dim in table.dims]
    whole = [i for i, n in enumerate(p["slice_sizes"]) if n == sizes[i] and i not in d.collapsed_slice_dims]
    bases.fix(table, [i for i in range(len(sizes)) if i not in whole])
    out = list(_Value.plain(shape_of(eqn)).dims)
    batching = getattr(d, "operand_batching_dims", ())
    rest = [i for i in range(len(sizes)) if i not in d.collapsed_slice_dims and i not in batching]
    for place, i in zip(d.offset_dims, rest, strict=True):
        if i in whole:
            out[place] = table.dims[i]
    return [_Value(tuple(out))]


def _dot(bases: _Bases, eqn: Any, values: list[_Value]) -> list[_Value]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    a, b = values
    for i, j in zip(lc, rc, strict=True):
        for x, y in bases.aligned(a.dims[i], b.dims[j]):
            bases.equal(x, y)
    bases.fix(a, lb)
    bases.fix(b, rb)
    dims: list[_Dim] = [_Value.plain([math.prod(p.size for p in a.dims[i])]).dims[0] for i in lb]
    for value, gone in ((a, {*lc, *lb}), (b, {*rc, *rb})):
        dims += [dim for i, dim in enumerate(value.dims) if i not in gone]
    return [_Value(tuple(dims))]


_OF_SQUARES = ("reduce_sum", "convert_element_type", "copy", "square", "integer_pow")
_RULES: Mapping[str, Callable[[_Bases, Any, list[_Value]], list[_Value]]] = {
    **dict.fromkeys(("neg", "copy", "copy_p", "real", "reduce_precision", "sharding_constraint", "name",
                     "optimization_barrier", "pvary", "stop_gradient"), _same),
    "convert_element_type": lambda s, eqn, v: (
        v if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else _pointwise(s, eqn, v)
    ),
    **dict.fromkeys(("add", "add_any", "sub"), _sum),
    "select_n": _select,
    **dict.fromkeys(("max", "min", "pow", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "cbrt", "tanh", "logistic",
                     "erf", "abs", "sign", "sin", "cos", "rem", "ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not",
                     "floor", "ceil", "round", "is_finite"), _pointwise),
    "mul": _product,
    "div": _quotient,
    "square": _square,
    "integer_pow": _square,
    "reduce_sum": _reduce_sum,
    **dict.fromkeys(("reduce_max", "reduce_min"), _reduce),
    "cumsum": _along("axis"),
    "rev": _along("dimensions"),
    "split": _along("axis"),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("slice", "dynamic_slice", "pad"), _cut),
    "dynamic_update_slice": _update,
    "concatenate": _concatenate,
    "gather": _gather,
    "dot_general": _dot,
}  # fmt: skip
