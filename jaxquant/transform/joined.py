"""Concatenated weights: an operation on them runs as if on each of them by itself.

``x @ concatenate([a, b], 1)`` is ``concatenate([x @ a, x @ b], 1)``, and along the contracted axis it is a sum. So
weights that are joined before they are used (the gates of a recurrent cell, say) need no common scales, and each is
planned, trained, calibrated and quantized on its own. Other operations run on the concatenated floats.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive, primitives

from jaxquant.core.arithmetic import promoted
from jaxquant.transform.interpreter import Interpreter, bind, handler_of, handles
from jaxquant.transform.primitives import shape_of, used_by
from jaxquant.transform.weights import (
    ABSENT,
    Joined,
    Part,
    Value,
    Weight,
    as_array,
    as_joined,
    as_part,
    reshape_dims,
    reshape_view,
)

__all__: list[str] = []

_Rule = Callable[[Interpreter, JaxprEqn, list[Value], int], list[Value] | None]
"""A handler of equations with one joined operand, at a place; None: the equation needs the concatenated floats."""

_NOTE = "joined with other weights before a product: multiplied one after the other"


@handles(primitives.concatenate_p)
def _concatenate(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    axis = eqn.params["dimension"]
    return [Joined(tuple(map(as_part, values)), axis, tuple(shape_of(v)[axis] for v in eqn.invars))]


@handles(jnp.stack)
def _stack(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """A concatenation along a new axis."""
    axis = eqn.params["axis"]
    shape = shape_of(eqn.invars[0])
    whole = [interpreter.whole(v) if isinstance(v, Joined) else v for v in values]
    parts = tuple(_reshaped(interpreter, v, (*shape[:axis], 1, *shape[axis:])) for v in whole)
    return [Joined(parts, axis, (1,) * len(parts))]


def _reshaped(interpreter: Interpreter, part: Part, shape: tuple[int, ...]) -> Part:
    if isinstance(part, Weight):
        return part.seen(reshape_view(shape, part.shape), reshape_dims(part.dims, shape))
    return part if interpreter.planning else jnp.reshape(as_array(part), shape)


@handles(Joined)
def _by_parts(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Any equation that a concatenation reaches, in whose place this is the handler."""
    places = [i for i, v in enumerate(values) if isinstance(v, Joined)]
    rule = _rules().get(eqn.primitive)
    if rule is not None and len(places) == 1:
        found = rule(interpreter, eqn, values, places[0])
        if found is not None:
            return found
    values = [interpreter.whole(v) if isinstance(v, Joined) else v for v in values]
    return _evaluated(interpreter, eqn, values)


def _evaluated(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """An equation on weights, or on none."""
    if any(isinstance(v, Weight) for v in values):
        return handler_of(eqn.primitive)(interpreter, eqn, values)
    return [ABSENT] * len(eqn.outvars) if interpreter.planning else [*bind(eqn, values)]


# -- products ----------------------------------------------------------------------------------------------------------


def _of_each(
    interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int, other: int | None, out: int | None
) -> list[Value]:
    """The equation for each part: concatenated along ``out``, or summed.

    ``other``: the axis of the other operand that lies beside the joined one, and is cut like it; None: it is not.
    """
    joined, before = as_joined(values[place]), len(interpreter.uses)
    outs: list[Value] = []
    start = 0
    for part, size in zip(joined.parts, joined.sizes, strict=True):
        own = list(values)
        own[place] = part
        if other is not None and not interpreter.planning:
            own[1 - place] = lax.slice_in_dim(as_array(values[1 - place]), start, start + size, axis=other)
        outs += _evaluated(interpreter, eqn, own)
        start += size
    if interpreter.planning:
        interpreter.uses[before:] = [dataclasses.replace(use, note=_NOTE) for use in interpreter.uses[before:]]
        return [ABSENT]
    arrays = [as_array(y) for y in outs]
    if out is not None:
        return [lax.concatenate(arrays, out)]
    dtype = arrays[0].dtype
    wide = promoted(dtype, jnp.float32)
    return [functools.reduce(jax.lax.add, [y.astype(wide) for y in arrays]).astype(dtype)]


def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], side: int) -> list[Value] | None:
    if isinstance(values[1 - side], Weight):
        return None
    contract, batch = eqn.params["dimension_numbers"]
    axis = as_joined(values[side]).axis
    if axis in contract[side]:
        return _of_each(interpreter, eqn, values, side, contract[1 - side][tuple(contract[side]).index(axis)], None)
    if axis in batch[side]:
        place = tuple(batch[side]).index(axis)
        return _of_each(interpreter, eqn, values, side, batch[1 - side][place], place)
    free = [
        [i for i in range(len(shape_of(v))) if i not in (*contract[s], *batch[s])] for s, v in enumerate(eqn.invars)
    ]
    out = len(batch[side]) + free[side].index(axis) + (len(free[0]) if side == 1 else 0)
    return _of_each(interpreter, eqn, values, side, None, out)


def _conv(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value] | None:
    p = eqn.params
    numbers = p["dimension_numbers"]
    if place != 1 or isinstance(values[0], Weight) or p["feature_group_count"] > 1 or p["batch_group_count"] > 1:
        return None
    axis = as_joined(values[1]).axis
    if axis == numbers.rhs_spec[0]:
        return _of_each(interpreter, eqn, values, 1, None, numbers.out_spec[1])
    if axis == numbers.rhs_spec[1]:
        return _of_each(interpreter, eqn, values, 1, numbers.lhs_spec[1], None)
    return None


# -- views -------------------------------------------------------------------------------------------------------------


def _elementwise(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value]:
    joined = as_joined(values[place])
    parts = tuple(as_part(_evaluated(interpreter, eqn, [part])[0]) for part in joined.parts)
    return [dataclasses.replace(joined, parts=parts)]


def _transpose(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value]:
    same = as_joined(*_elementwise(interpreter, eqn, values, place))
    return [dataclasses.replace(same, axis=tuple(eqn.params["permutation"]).index(same.axis))]


def _reshape(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value] | None:
    """A reshape, or new axes of size 1, that leaves the joined axis alone."""
    old, new = shape_of(eqn.invars[place]), shape_of(eqn.outvars[0])
    joined, kept = as_joined(values[place]), eqn.params.get("broadcast_dimensions")
    lead, n = math.prod(old[: joined.axis]), old[joined.axis]
    axes = [i for i, m in enumerate(new) if m == n and math.prod(new[:i]) == lead]
    ordered = kept is None or list(kept) == sorted(kept)
    permuted = eqn.primitive is primitives.reshape_p and eqn.params["dimensions"] is not None
    if len(axes) != 1 or math.prod(new) != math.prod(old) or not ordered or permuted:
        return None
    (axis,) = axes

    shapes = [(*new[:axis], size, *new[axis + 1 :]) for size in joined.sizes]
    parts = tuple(_reshaped(interpreter, part, shape) for part, shape in zip(joined.parts, shapes, strict=True))
    return [Joined(parts, axis, joined.sizes)]


def _taken(joined: Joined, low: int, high: int) -> Value | None:
    """The parts from ``low`` to ``high`` along the joined axis, if those are whole parts; else None."""
    starts = list(itertools.accumulate(joined.sizes, initial=0))
    if low not in starts or high not in starts or low == high:
        return None
    first, last = starts.index(low), starts.index(high)
    parts, sizes = joined.parts[first:last], joined.sizes[first:last]
    return parts[0] if len(parts) == 1 else Joined(parts, joined.axis, sizes)


def _slice(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value] | None:
    joined, p = as_joined(values[place]), eqn.params
    bounds = list(zip(p["start_indices"], p["limit_indices"], strict=True))
    others = [b == (0, n) for b, n in zip(bounds, shape_of(eqn.invars[place]), strict=True)]
    if not all(whole for i, whole in enumerate(others) if i != joined.axis) or p["strides"] is not None:
        return None
    taken = _taken(joined, *bounds[joined.axis])
    return None if taken is None else [taken]


def _split(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value] | None:
    joined, ends = as_joined(values[place]), list(itertools.accumulate(map(int, eqn.params["sizes"]), initial=0))
    if eqn.params["axis"] != joined.axis:
        return None
    taken = [part for bounds in itertools.pairwise(ends) if (part := _taken(joined, *bounds)) is not None]
    return taken if len(taken) == len(ends) - 1 else None


def _again(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], place: int) -> list[Value] | None:
    """A concatenation of a concatenation."""
    joined, axis = as_joined(values[place]), eqn.params["dimension"]
    if joined.axis != axis:
        return None
    parts, sizes = [as_part(v) for v in values if v is not joined], [shape_of(v)[axis] for v in eqn.invars]
    parts[place:place], sizes[place : place + 1] = joined.parts, joined.sizes
    return [Joined(tuple(parts), axis, tuple(sizes))]


@functools.cache
def _rules() -> dict[Primitive | None, _Rule]:
    found = {
        primitives.dot_general_p: _dot_general,
        primitives.conv_general_dilated_p: _conv,
        primitives.convert_element_type_p: _elementwise,
        primitives.copy_p: _elementwise,
        primitives.transpose_p: _transpose,
        primitives.slice_p: _slice,
        used_by(lax.split): _split,
        primitives.concatenate_p: _again,
    }
    found.update(dict.fromkeys((primitives.reshape_p, primitives.squeeze_p, primitives.broadcast_in_dim_p), _reshape))
    return found
