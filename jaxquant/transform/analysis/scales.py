"""`scale_pairs`: which per-channel scales can move from one parameter of a function to another, by its trace.

Multiply the rows of a weight by s and divide the gain of the norm before it by s: the function stays what it is. So it
does for two linear layers with a ReLU in between, for the values of an attention and the projection behind it, and not
if the divided value goes anywhere else as well (a residual connection, say). Which parameters can exchange scales
follows from the trace alone.

The unknown of an axis (`jaxquant.transform.analysis.equations`) is the scale of its entries. The terms of a sum have
equal scales, contracted axes have opposite ones, what enters a nonlinear function, or leaves the function, has none.
Of a product of two scaled values one has none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxquant.core.paths import Leaf, Params
from jaxquant.core.types import PyTree
from jaxquant.transform.analysis.equations import (
    Dim,
    Equations,
    Parameter,
    Piece,
    Unknown,
    Value,
    joined,
    moving,
    rules,
    traced_for,
)  # fmt: skip
from jaxquant.transform.analysis.flow import Flow, flows
from jaxquant.transform.analysis.walk import Rule
from jaxquant.transform.plan import Plan
from jaxquant.transform.primitives import shape_of

__all__ = ["Member", "ScalePair", "scale_pairs"]


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
      stack: sizes of the stacked axes. A member with more of them has the same scale in all its layers.
    """

    sinks: tuple[Member, ...]
    sources: tuple[Member, ...]
    channels: int
    stack: tuple[int, ...] = ()

    def __str__(self) -> str:
        def show(m: Member) -> str:
            return f"{m.path}[{m.axis}]{'' if m.power > 0 else '^-1'}"

        return f"{', '.join(map(show, self.sources))} -> {', '.join(map(show, self.sinks))} ({self.channels} channels)"


def scale_pairs(
    fn: Callable[..., PyTree], plan: Plan, params: Params, *args: PyTree, **kwargs: PyTree
) -> tuple[ScalePair, ...]:
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
      >>> for pair in jq.invariances.scale_pairs(fn, plan, params, jnp.ones((3, 4))):
      ...     print(pair)
      bias[-1]^-1, up[-1]^-1 -> down[-2] (8 channels)

    Source: Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438), figure 6; Nagel et al. 2019 (arXiv:1906.04721), equation
      6. Both name the pairs by hand; here they are the solutions of the trace's scale equations.
    """
    scales = _Scales()
    scales.solve(traced_for("scale_pairs", fn, plan, params, args, kwargs))
    out = []
    for first, group in scales.solutions(plan):
        members = [Member(u.path, u.axis, first.power * u.power, len(u.stack)) for u in group]
        sinks = [m for m in members if m.path in plan and m.axis in plan[m.path].reduce_axes and m.power > 0]
        sources = [m for m in members if m not in sinks]
        if sources:
            out.append(ScalePair(tuple(sinks), tuple(sources), first.size, first.root.stack))
    return tuple(out)


class _Scales(Equations):
    """The scales of a function's values: any leaves 0, inf and nan as they are."""

    layered, opposite = True, -1

    def __init__(self) -> None:
        super().__init__()
        self.rules = _rules()
        self.levels: dict[str, set[int]] = {}  # at how many stacked axes each parameter is used

    def unknown(self, path: str, axis: int, size: int, stack: tuple[int, ...], leaf: Leaf) -> Unknown:
        return Unknown(path, axis, size, stack)

    def usable(self, unknown: Unknown) -> bool:
        return unknown.size > 1 and len(unknown.stack) in self.levels.get(unknown.path, ())

    def constant(self, x: ArrayLike) -> Value:
        known = np.ndim(x) == 0 and not isinstance(x, jax.core.Tracer)
        number = known and jnp.issubdtype(jnp.result_type(x), jnp.number)
        return Value.plain(np.shape(x), nil=bool(number and (x == 0 or not np.isfinite(x))))

    def read(self, value: Value) -> Value:
        """Fixed unknowns are forgotten: an axis may be one piece without them."""
        free = lambda x: Piece(x.size) if x.unknown is not None and not x.unknown.free else x  # noqa: E731
        return dataclasses.replace(value, dims=tuple(joined(map(free, dim)) for dim in value.dims))

    def cut(self, piece: Piece, outer: int) -> tuple[Piece, Piece]:
        inner = piece.size // outer
        return piece._replace(size=outer, stride=piece.stride * inner), piece._replace(size=inner)

    def equated(self, pairs: Iterable[tuple[Dim, Dim]], power: int = 1) -> list[Dim]:
        """Two unknowns are one if all pieces of each meet the same pieces of the other."""
        pairs, met = list(pairs), {}
        for a, b in pairs:
            for x, y in self.aligned(a, b):
                for one, other in ((x, y), (y, x)):
                    if one.unknown is not None:
                        met.setdefault(one.unknown, set()).add((other.unknown, one.stride == other.stride))
        for unknown, found in met.items():
            partner, alike = next(iter(found))
            if len(found) == 1 and alike and partner is not None:
                self.join(unknown, partner, power)
            else:
                for one in (unknown, *(other for other, _ in found)):
                    self.fix_unknown(one)
        return [a for a, _ in pairs]

    # -- scans: what is scanned over is scaled layer by layer; what is carried is not scaled ---------------------------
    def carried(self, value: Value) -> Value:
        self.fix(value)
        return Value.plain(value.shape)

    def layer(self, value: Value) -> Value:
        if isinstance(value, Parameter):
            assert value.leaf is not None
            return self.parameter(value.path, value.leaf, (*value.stack, value.leaf.shape[len(value.stack)]))
        self.fix(value)
        return Value.plain(value.shape[1:])

    def again(self, before: Value, after: Value) -> Value:
        self.fix(after)
        return before

    def stacked(self, value: Value, length: int) -> Value:
        self.fix(value)
        return Value.plain((length, *value.shape))

    # -- rules ---------------------------------------------------------------------------------------------------------
    def simple(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """A parameter that is used whole and layer by layer has no scale."""
        for value in values:
            if isinstance(value, Parameter):
                levels = self.levels.setdefault(value.path, set())
                levels.add(len(value.stack))
                for unknown in self.unknowns.values() if len(levels) > 1 else ():
                    if unknown.path == value.path:
                        self.fix_unknown(unknown)
        return super().simple(eqn, [Value(value.dims, value.nil) for value in values])

    def select(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        self.fix(values[0])
        return self.sum(eqn, values[1:])

    def compare(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Whether a value is above zero does not depend on its scale."""
        if not any(v.nil for v in values):
            self.sum(eqn, values)
        return self.unscaled(eqn, values)

    def unscaled(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        return [Value.plain(shape_of(eqn.outvars[0]))]

    def product(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        a, b = self.full(values, shape_of(eqn.outvars[0]))
        if a.unknowns and b.unknowns:
            self.fix(b)
        return [Value((a if a.unknowns else b).dims, a.nil or b.nil)]

    def dot(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Of a batch axis one operand is scaled; but an unknown that is contracted in part is matched there too."""
        contract, batch = eqn.params["dimension_numbers"]
        (out, contracted), summed = flows()[eqn.primitive](eqn), set()
        for value, inside, shared in zip(values, contract, batch, strict=True):
            here = Value(tuple(value.dims[i] for i in inside)).unknowns
            free = (dim for i, dim in enumerate(value.dims) if i not in inside and i not in shared)
            for unknown in here & Value(tuple(free)).unknowns:
                self.fix_unknown(unknown)
            summed |= here
        for n, places in enumerate(zip(*batch, strict=True)):
            left, right = (Value((value.dims[i],)).unknowns for value, i in zip(values, places, strict=True))
            a, b = enumerate(places)
            if summed & (left | right):
                contracted = [*contracted, (a, b)]
            else:
                out[n] = [a if left else b]
        return self.moved(eqn, values, Flow(out, contracted))


@functools.cache
def _rules() -> dict[Primitive | None, Rule[Value]]:
    homogeneous = (
        p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.cummax_p, p.cummin_p, p.reduce_window_sum_p,
        p.reduce_window_max_p, p.conv_general_dilated_p,
    )  # fmt: skip
    return {
        **rules(),
        **dict.fromkeys(homogeneous, moving),
        p.abs_p: Equations.same,
        p.sign_p: _Scales.unscaled,
        **dict.fromkeys((p.max_p, p.min_p), Equations.sum),
        **dict.fromkeys((p.ge_p, p.gt_p, p.le_p, p.lt_p, p.eq_p, p.ne_p), _Scales.compare),
        p.select_n_p: _Scales.select,
        p.mul_p: _Scales.product,
        p.dot_general_p: _Scales.dot,
    }
