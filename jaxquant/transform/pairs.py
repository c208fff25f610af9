"""`scale_pairs`: which per-channel scales can move from one parameter of a function to another, by its trace.

Multiply the rows of a weight by s and divide the gain of the norm before it by s: the function stays what it is. So it
does for two linear layers with a ReLU in between, for the values of an attention and the projection behind it, and not
if the divided value goes anywhere else as well (a residual connection, say). Which parameters can exchange scales
follows from the trace alone.

Each axis of each parameter gets an unknown: the logarithm of the scale of its entries. Evaluating the jaxpr on those
unknowns gives every value's scale along every axis, and one linear equation for each operation: the terms of a sum have
equal scales, contracted axes have opposite ones, what enters a nonlinear function, or leaves the function, has none.
The equations only ever say that two unknowns are equal, opposite or zero, so a union-find with signs solves them;
what is left over are the free scales. Where an equation could say more (a product of two scaled values), one side is
set to zero: a pair may be missed, never wrong.

Values are followed through reshapes as in `jaxquant.transform.weights`: a piece of an axis is ``(unknown, stride,
size)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxquant.core.arithmetic import promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.transform.paths import leaves_with_paths
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.trace import trace

__all__ = ["Member", "ScalePair", "body_of", "rescale", "scale_pairs", "shape_of"]


class Member(NamedTuple):
    """One axis of one parameter that takes part.

    Attributes:
      path: the parameter.
      axis: the axis along which it is scaled, counted from the end.
      power: +1 if it is multiplied by the scale, -1 if it is divided.
      stacked: leading axes that a scan consumes.
    """

    path: str
    axis: int
    power: int
    stacked: int


@dataclasses.dataclass(frozen=True)
class ScalePair:
    """Parameters that one scale can move between; made by `scale_pairs`.

    Attributes:
      sinks: the planned weights that contract the channels; they are multiplied by the scale.
      sources: what makes those channels (a norm's gain and bias, a linear weight's outputs and its bias), and whatever
        else has to be scaled along with it.
      channels: how many channels; the scale has shape [channels], or [layers, channels] for stacked parameters.
      stack: sizes of the stacked axes.
    """

    sinks: tuple[Member, ...]
    sources: tuple[Member, ...]
    channels: int
    stack: tuple[int, ...] = ()

    def __str__(self) -> str:
        def show(m: Member) -> str:
            return f"{m.path}[{m.axis}]{'' if m.power > 0 else '^-1'}"

        return f"{', '.join(map(show, self.sources))} -> {', '.join(map(show, self.sinks))} ({self.channels} channels)"


def scale_pairs(fn: Callable[..., Any], plan: Plan, params: Any, *args: Any, **kwargs: Any) -> tuple[ScalePair, ...]:
    """Which scales can move into the planned weights of ``fn``, and from where.

    Args:
      fn: a function of params; traced, never run.
      plan: its plan.
      params: its parameters: arrays or shapes.
      *args, **kwargs: its further arguments: arrays or shapes, and anything static.

    Returns:
      One `ScalePair` for each independent scale that reaches the contracted axis of a planned weight, in the order of
      the plan. `rescale` applies one.

    Raises:
      QuantError: if params do not fit the plan.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.zeros((1, 8)), "down": jnp.ones((8, 2))}
      >>> plan = jq.make_plan(fn, params, jnp.ones((3, 4)), rules=[jq.Rule("up|down", recipes.w8a8())])
      >>> for pair in jq.scale_pairs(fn, plan, params, jnp.ones((3, 4))):
      ...     print(pair)
      bias[-1]^-1, up[-1]^-1 -> down[-2] (8 channels)

    Source: Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438), figure 6; Nagel et al. 2019 (arXiv:1906.04721), equation
      6. Both name the pairs by hand; here they are the solutions of the trace's scale equations.
    """
    check_plan("scale_pairs", plan, leaves_with_paths(params)[0])
    traced = trace("scale_pairs", fn, params, args, kwargs)
    scales = _Scales()
    while True:
        before = scales.changes
        scales.levels = {}
        inputs = [scales.parameter(path, leaf) for path, leaf in traced.params.items()]
        inputs += [_Value.unscaled(a.shape) for a in traced.arrays]
        for value in scales.run(traced.jaxpr, inputs):
            scales.fix(value)
        scales.fix_levels()
        if scales.changes == before:
            break
    return scales.pairs(plan)


def rescale(params: Any, pair: ScalePair, scale: jax.Array) -> Any:
    """Moves a scale: sinks are multiplied by it along their channels, sources divided. The function stays the same.

    Args:
      params: float parameters.
      pair: from `scale_pairs`.
      scale: positive, ``[*pair.stack, pair.channels]``.

    Returns:
      The same tree.

    Raises:
      QuantError: if the scale has another shape.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.transform.pairs import Member
      >>> pair = jq.transform.ScalePair((Member("b", -2, 1, 0),), (Member("a", -1, -1, 0),), 2)
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> new = jq.rescale(params, pair, jnp.array([2.0, 4.0]))
      >>> new["a"].tolist(), new["b"].tolist()
      ([[0.5, 0.25]], [[2.0], [4.0]])
    """
    expected = (*pair.stack, pair.channels)
    if tuple(jnp.shape(scale)) != expected:
        raise quant_error(
            "rescale", "the scale does not fit the pair", todo=f"Pass one of shape {expected}", shape=jnp.shape(scale)
        )
    leaves, treedef = leaves_with_paths(params)
    for member in (*pair.sinks, *pair.sources):
        w = jnp.asarray(leaves[member.path])
        shape = [*w.shape[: member.stacked], *[1] * (w.ndim - member.stacked)]
        shape[member.axis] = pair.channels
        factor = jnp.asarray(scale, promoted(w.dtype, jnp.float32)).reshape(shape)
        leaves[member.path] = (w * factor if member.power > 0 else w / factor).astype(w.dtype)
    return jax.tree.unflatten(treedef, leaves.values())


# -- unknowns ----------------------------------------------------------------------------------------------------------


class _Unknown:
    """The scale of one axis of one parameter: ``sign`` times its parent's, or its own, or none (``fixed``)."""

    def __init__(self, path: str, axis: int, size: int, stack: tuple[int, ...]):
        self.path, self.axis, self.size, self.stack = path, axis, size, stack
        self.parent, self.sign, self.fixed = self, 1, False

    def root(self) -> tuple[_Unknown, int]:
        sign, node = 1, self
        while node.parent is not node:
            sign, node = sign * node.sign, node.parent
        return node, sign

    @property
    def free(self) -> bool:
        return not self.root()[0].fixed


class _Piece(NamedTuple):
    """A piece of an axis: entry i is entry ``i * stride`` (and whatever the other pieces add) of an unknown.

    Attributes:
      unknown: None if nothing scales along here.
      stride: 0 if so.
      size: entries.
    """

    unknown: _Unknown | None
    stride: int
    size: int

    def cut(self, outer: int) -> tuple[_Piece, _Piece]:
        """In two, the first with ``outer`` entries."""
        inner = self.size // outer
        return _Piece(self.unknown, self.stride * inner, outer), _Piece(self.unknown, self.stride, inner)


_Dim = tuple[_Piece, ...]


def _plain(n: int) -> _Dim:
    return (_Piece(None, 0, n),) if n != 1 else ()


def _joined(pieces: Iterable[_Piece]) -> _Dim:
    """Pieces of one axis, neighbours that belong together put together; fixed unknowns forgotten."""
    out: list[_Piece] = []
    for piece in pieces:
        if piece.size == 1:
            continue
        if piece.unknown is not None and not piece.unknown.free:
            piece = _Piece(None, 0, piece.size)
        last = out[-1] if out else None
        if last is not None and last.unknown is piece.unknown and last.stride == piece.stride * piece.size:
            out[-1] = _Piece(piece.unknown, piece.stride, last.size * piece.size)
        else:
            out.append(piece)
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class _Value:
    """The scales of a value.

    Attributes:
      dims: the pieces of each axis.
      nil: whether any scale leaves it as it is: 0, inf, nan.
      parameter: (path, stacked) if it is a parameter, not yet touched.
    """

    dims: tuple[_Dim, ...]
    nil: bool = False
    parameter: tuple[str, tuple[int, ...], Any] | None = None

    @classmethod
    def unscaled(cls, shape: Iterable[int], *, nil: bool = False) -> _Value:
        return cls(tuple(_plain(n) for n in shape), nil)

    def unknowns(self) -> set[_Unknown]:
        return {p.unknown for dim in self.dims for p in dim if p.unknown is not None}


def _nil(x: Any) -> bool:
    return np.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.floating) and (x == 0 or not np.isfinite(x))


def _aligned(a: _Dim, b: _Dim) -> tuple[list[tuple[_Piece, _Piece]], bool]:
    """Two descriptions of one axis cut at the same places; False if they cannot be."""
    left, right, out = list(a), list(b), []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size and x.size % y.size == 0:
            x, rest = x.cut(y.size)
            left.insert(0, rest)
        elif y.size > x.size and y.size % x.size == 0:
            y, rest = y.cut(x.size)
            right.insert(0, rest)
        elif x.size != y.size:
            return [], False
        out.append((x, y))
    return out, not left and not right


# -- equations ---------------------------------------------------------------------------------------------------------


class _Scales:
    """The unknowns, and what is known of them."""

    def __init__(self):
        self.unknowns: dict[tuple[str, int, int], _Unknown] = {}
        self.levels: dict[str, set[int]] = {}  # at how many stacked axes each parameter is used
        self.changes = 0

    def parameter(self, path: str, leaf: Any, stack: tuple[int, ...] = ()) -> _Value:
        """A parameter, every axis with an unknown of its own."""
        shape = tuple(leaf.shape)[len(stack) :]
        if not is_float(leaf) or isinstance(leaf, QTensor):
            return _Value.unscaled(shape)
        dims = []
        for i, n in enumerate(shape):
            key = (path, i - len(shape), len(stack))
            unknown = self.unknowns.setdefault(key, _Unknown(path, key[1], n, stack))
            dims.append(_joined([_Piece(unknown, 1, n)]))
        return _Value(tuple(dims), parameter=(path, stack, leaf))

    def fix_unknown(self, unknown: _Unknown | None) -> None:
        if unknown is not None and unknown.free:
            unknown.root()[0].fixed = True
            self.changes += 1

    def fix(self, value: _Value, axes: Iterable[int] | None = None) -> None:
        """No scale along these axes (all of them)."""
        for i in range(len(value.dims)) if axes is None else axes:
            for piece in value.dims[i]:
                self.fix_unknown(piece.unknown)

    def join(self, a: _Unknown, b: _Unknown, sign: int) -> None:
        """a = sign * b."""
        (ra, sa), (rb, sb) = a.root(), b.root()
        if ra is rb:
            if sa != sign * sb:
                self.fix_unknown(a)
        elif ra.fixed or rb.fixed or ra.size != rb.size or ra.stack != rb.stack:
            self.fix_unknown(a)
            self.fix_unknown(b)
        else:
            ra.parent, ra.sign = rb, sa * sign * sb
            self.changes += 1

    def equate(self, pairs: Iterable[tuple[_Dim, _Dim]], sign: int = 1) -> None:
        """Scales of two values along the same axes: equal, or opposite."""
        matches: dict[_Unknown, set[tuple[_Unknown | None, int, int]]] = {}
        for a, b in pairs:
            found, whole = _aligned(a, b)
            if not whole:
                for piece in (*a, *b):
                    self.fix_unknown(piece.unknown)
            for x, y in found:
                for one, other in ((x, y), (y, x)):
                    if one.unknown is not None:
                        matches.setdefault(one.unknown, set()).add((other.unknown, one.stride, other.stride))
        for unknown, others in matches.items():
            partners = {partner for partner, _, _ in others}
            partner = next(iter(partners))
            if len(partners) == 1 and partner is not None and all(s == t for _, s, t in others):
                self.join(unknown, partner, sign)
            else:
                self.fix_unknown(unknown)
                for other in partners:
                    self.fix_unknown(other)

    def fix_levels(self) -> None:
        """A parameter that is used whole and layer by layer has no scale."""
        for path, levels in self.levels.items():
            if len(levels) > 1:
                for unknown in self.unknowns.values():
                    if unknown.path == path:
                        self.fix_unknown(unknown)

    def pairs(self, plan: Plan) -> tuple[ScalePair, ...]:
        groups: dict[_Unknown, list[tuple[_Unknown, int]]] = {}
        for unknown in self.unknowns.values():
            if unknown.free and len(unknown.stack) in self.levels.get(unknown.path, ()):
                root, sign = unknown.root()
                groups.setdefault(root, []).append((unknown, sign))
        out = []
        for item in plan.items:
            for axis in item.reduce_axes:
                unknown = self.unknowns.get((item.path, axis, item.stacked))
                if unknown is None or unknown.root()[0] not in groups or unknown.size == 1:
                    continue
                group = groups.pop(unknown.root()[0])
                turn = next(sign for u, sign in group if u is unknown)
                members = [Member(u.path, u.axis, turn * sign, len(u.stack)) for u, sign in group]
                sinks = [m for m in members if m.path in plan and m.axis in plan[m.path].reduce_axes and m.power > 0]
                sources = [m for m in members if m not in sinks]
                if sources:
                    out.append(ScalePair(tuple(sinks), tuple(sources), unknown.size, unknown.stack))
        return tuple(out)

    # -- evaluation ----------------------------------------------------------------------------------------------------
    def run(self, closed: ClosedJaxpr, inputs: list[_Value]) -> list[_Value]:
        jaxpr = closed.jaxpr
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update((v, _Value.unscaled(v.aval.shape)) for v in jaxpr.constvars)

        def read(v: Any) -> _Value:
            if isinstance(v, Literal):
                return _Value.unscaled(np.shape(v.val), nil=_nil(v.val))
            value = env[v]
            return dataclasses.replace(value, dims=tuple(_joined(dim) for dim in value.dims))

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            name = str(eqn.primitive)
            inner = body_of(eqn)
            if inner is not None:
                results = self.run(inner, values)
            elif name == "scan":
                results = self.scan(eqn, values)
            else:
                for value in values:
                    if value.parameter is not None:
                        self.levels.setdefault(value.parameter[0], set()).add(len(value.parameter[1]))
                values = [dataclasses.replace(v, parameter=None) for v in values]
                results = _RULES.get(name, _nonlinear)(self, eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def scan(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """What is scanned over is scaled layer by layer; what is carried is not scaled."""
        p = eqn.params
        fixed = p["num_consts"] + p["num_carry"]
        inner = []
        for i, (value, v) in enumerate(zip(values, p["jaxpr"].jaxpr.invars, strict=True)):
            if i < p["num_consts"]:
                inner.append(value)
            elif i >= fixed and value.parameter is not None:
                path, stack, leaf = value.parameter
                inner.append(self.parameter(path, leaf, (*stack, tuple(leaf.shape)[len(stack)])))
            else:
                self.fix(value)
                inner.append(_Value.unscaled(v.aval.shape))
        for result in self.run(p["jaxpr"], inner):
            self.fix(result)
        return [_Value.unscaled(v.aval.shape) for v in eqn.outvars]


def body_of(eqn: Any) -> ClosedJaxpr | None:
    """The body of a call that is evaluated once, on the values of its operands."""
    if str(eqn.primitive) in ("scan", "while", "cond", "shard_map"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(name)
        if body is not None:
            closed = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
            return closed if len(closed.jaxpr.invars) == len(eqn.invars) else None
    return None


def shape_of(eqn: Any) -> tuple[int, ...]:
    """The shape of an equation's first result."""
    return tuple(eqn.outvars[0].aval.shape)


def _nonlinear(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    for value in values:
        scales.fix(value)
    return [_Value.unscaled(v.aval.shape) for v in eqn.outvars]


def _same(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Linear and elementwise: each result is scaled as its operand."""
    return values[: len(eqn.outvars)]


def _elementwise(values: list[_Value], shape: tuple[int, ...]) -> list[_Value]:
    """Operands in the shape of the result: scalars and axes of size 1 are repeated."""
    out = []
    for value in values:
        dims = value.dims if value.dims else ((),) * len(shape)
        dims = tuple(dim or _plain(n) for dim, n in zip(dims, shape, strict=True))
        out.append(_Value(dims, value.nil))
    return out


def _sum(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Sums, maxima: all terms have one scale. Zeros have any."""
    values = _elementwise(values, shape_of(eqn))
    terms = [v for v in values if not v.nil] or values[:1]
    for other in terms[1:]:
        scales.equate(zip(terms[0].dims, other.dims, strict=True))
    return [dataclasses.replace(terms[0], nil=terms[0].nil and len(terms) == 1)]


def _select(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    scales.fix(values[0])
    return _sum(scales, eqn, values[1:])


def _compare(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Whether a value is above zero does not depend on its scale."""
    if not any(v.nil for v in values):
        _sum(scales, eqn, values)
    return [_Value.unscaled(shape_of(eqn))]


def _product(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    a, b = _elementwise(values, shape_of(eqn))
    if b.unknowns() and a.unknowns():
        scales.fix(b)
    return [dataclasses.replace(a if a.unknowns() else b, nil=a.nil or b.nil)]


def _quotient(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    a, b = _elementwise(values, shape_of(eqn))
    scales.fix(b)
    return [a]


def _reduce(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    axes = eqn.params["axes"]
    out = []
    for value in values:
        scales.fix(value, axes)
        out.append(_Value(tuple(d for i, d in enumerate(value.dims) if i not in axes), value.nil))
    return out


def _along(name: str) -> Callable[..., list[_Value]]:
    """Something along the axes of this parameter, which forbids a scale there and nowhere else."""

    def rule(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
        axes = eqn.params[name]
        axes = {axes} if isinstance(axes, int) else set(axes)
        scales.fix(values[0], axes)
        shapes = [tuple(v.aval.shape) for v in eqn.outvars]
        kept = values[0].dims
        return [_Value(tuple(_plain(n) if i in axes else kept[i] for i, n in enumerate(s))) for s in shapes]

    return rule


def _transpose(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    return [dataclasses.replace(values[0], dims=tuple(values[0].dims[i] for i in eqn.params["permutation"]))]


def _broadcast(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    dims = [_plain(n) for n in shape_of(eqn)]
    for i, dim in zip(eqn.params["broadcast_dimensions"], values[0].dims, strict=True):
        if dim:  # an axis of size 1 is repeated: no scale along the copies
            dims[i] = dim
    return [_Value(tuple(dims), values[0].nil)]


def _reshape(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    if eqn.params.get("dimensions") is not None and str(eqn.primitive) == "reshape":
        return _nonlinear(scales, eqn, values)
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
                first, rest = piece.cut(n)
                dim.append(first)
                pieces.insert(0, rest)
                n = 1
            else:
                scales.fix_unknown(piece.unknown)
                scales.fix_unknown(pieces[0].unknown)
                pieces[0] = _Piece(None, 0, piece.size * pieces[0].size)
        dims.append(_joined(dim))
    return [_Value(tuple(dims), values[0].nil)]


def _cut(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Slices and paddings: no scale along an axis whose size changes."""
    dims, shape = values[0].dims, shape_of(eqn)
    changed = [i for i, n in enumerate(shape) if n != math.prod(p.size for p in dims[i])]
    scales.fix(values[0], changed)
    for other in values[1:]:
        scales.fix(other)
    if str(eqn.primitive) == "pad" and not values[1].nil:
        return _nonlinear(scales, eqn, values)
    return [_Value(tuple(_plain(n) if i in changed else dims[i] for i, n in enumerate(shape)))]


def _concatenate(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    axis = eqn.params["dimension"]
    for value in values:
        scales.fix(value, [axis])
        scales.equate((d, e) for i, (d, e) in enumerate(zip(values[0].dims, value.dims, strict=True)) if i != axis)
    dims = list(values[0].dims)
    dims[axis] = _plain(shape_of(eqn)[axis])
    return [_Value(tuple(dims))]


def _gather(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Whole rows of a table keep their scales."""
    table, p = values[0], eqn.params
    d = p["dimension_numbers"]
    sizes = [math.prod(q.size for q in dim) for dim in table.dims]
    whole = [i for i, n in enumerate(p["slice_sizes"]) if n == sizes[i] and i not in d.collapsed_slice_dims]
    scales.fix(table, [i for i in range(len(sizes)) if i not in whole])
    out = [_plain(n) for n in shape_of(eqn)]
    batching = getattr(d, "operand_batching_dims", ())
    rest = [i for i in range(len(sizes)) if i not in d.collapsed_slice_dims and i not in batching]
    for place, i in zip(d.offset_dims, rest, strict=True):
        if i in whole:
            out[place] = table.dims[i]
    return [_Value(tuple(out))]


def _dot(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    a, b = values
    return [_contract(scales, a, b, list(zip(lc, rc, strict=True)), list(zip(lb, rb, strict=True)))]


def _contract(
    scales: _Scales, a: _Value, b: _Value, contracted: list[tuple[int, int]], batch: list[tuple[int, int]]
) -> _Value:
    """Contracted axes have opposite scales; batch axes multiply; the others stay."""
    sides = (
        (a, [i for i, _ in contracted], [i for i, _ in batch]),
        (b, [j for _, j in contracted], [j for _, j in batch]),
    )
    summed: set[_Unknown] = set()
    for value, inside, shared in sides:
        here = {p.unknown for i in inside for p in value.dims[i] if p.unknown is not None}
        free = set(range(len(value.dims))) - {*inside, *shared}
        for unknown in here & {p.unknown for i in free for p in value.dims[i]}:
            scales.fix_unknown(unknown)
        summed |= here
    both = [(a.dims[i], b.dims[j]) for i, j in contracted]
    # An unknown that is contracted in part must be matched on the batch axes with the rest of it.
    both += [
        (a.dims[i], b.dims[j])
        for i, j in batch
        if any(p.unknown in summed for p in (*a.dims[i], *b.dims[j]) if p.unknown is not None)
    ]
    scales.equate(both, -1)
    dims: list[_Dim] = []
    for i, j in batch:
        mine, other = _joined(a.dims[i]), _joined(b.dims[j])
        if any(p.unknown in summed for p in (*mine, *other) if p.unknown is not None):
            dims.append(_plain(math.prod(p.size for p in mine)))
            continue
        active = [any(p.unknown is not None for p in dim) for dim in (mine, other)]
        if all(active):
            for piece in other:
                scales.fix_unknown(piece.unknown)
        dims.append(mine if active[0] else other)
    for value, inside, shared in sides:
        dims += [dim for i, dim in enumerate(value.dims) if i not in inside and i not in shared]
    return _Value(tuple(dims))


def _conv(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    p, (x, kernel) = eqn.params, values
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return _nonlinear(scales, eqn, values)
    n = p["dimension_numbers"]
    scales.fix(x, n.lhs_spec[2:])
    scales.fix(kernel, n.rhs_spec[2:])
    scales.equate([(x.dims[n.lhs_spec[1]], kernel.dims[n.rhs_spec[1]])], -1)
    dims = [_plain(size) for size in shape_of(eqn)]
    dims[n.out_spec[0]], dims[n.out_spec[1]] = x.dims[n.lhs_spec[0]], kernel.dims[n.rhs_spec[0]]
    return [_Value(tuple(dims))]


def _window(scales: _Scales, eqn: Any, values: list[_Value]) -> list[_Value]:
    """Pooling: no scale along the axes of the window."""
    axes = [i for i, n in enumerate(eqn.params["window_dimensions"]) if n != 1]
    scales.fix(values[0], axes)
    dims = [_plain(n) if i in axes else values[0].dims[i] for i, n in enumerate(shape_of(eqn))]
    return [_Value(tuple(dims))]


_RULES: Mapping[str, Callable[[_Scales, Any, list[_Value]], list[_Value]]] = {
    **dict.fromkeys(("neg", "copy", "copy_p", "abs", "real", "reduce_precision", "sharding_constraint", "name",
                     "optimization_barrier", "pvary", "stop_gradient"), _same),
    "convert_element_type": lambda s, eqn, v: (
        v if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else _nonlinear(s, eqn, v)
    ),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min"), _sum),
    "select_n": _select,
    **dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne"), _compare),
    "sign": lambda s, eqn, v: [_Value.unscaled(shape_of(eqn))],
    "mul": _product,
    "div": _quotient,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _along("axis")),
    "rev": _along("dimensions"),
    "split": _along("axis"),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("slice", "dynamic_slice", "pad"), _cut),
    "concatenate": _concatenate,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _window),
}  # fmt: skip
