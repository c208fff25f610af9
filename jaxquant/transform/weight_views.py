"""Handlers of the primitives that only look at a weight differently."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn, Literal, primitives
from jax.sharding import AxisType, PartitionSpec

from jaxquant.core.types import PyTree
from jaxquant.transform.interpreter import Interpreter, bind, handles, unsupported
from jaxquant.transform.primitives import marked_varying, reshard, shape_of
from jaxquant.transform.weights import (
    ABSENT,
    Atom,
    Value,
    View,
    Weight,
    as_array,
    as_weight,
    cast_view,
    flip_view,
    reshape_dims,
    reshape_view,
    slice_view,
    transpose_view,
)

__all__: list[str] = []


@handles(primitives.transpose_p)
def _transpose(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w = as_weight(*values)
    permutation = tuple(eqn.params["permutation"])
    return [w.seen(transpose_view(permutation), tuple(w.dims[i] for i in permutation))]


@handles(primitives.reshape_p, primitives.squeeze_p)
def _reshape(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, shape = as_weight(values[0]), shape_of(eqn.outvars[0])
    order = eqn.params.get("dimensions")
    if eqn.primitive is primitives.reshape_p and order is not None:  # row-major after a transpose
        w = w.seen(transpose_view(tuple(order)), tuple(w.dims[i] for i in order))
    return [w.seen(reshape_view(shape, w.shape), reshape_dims(w.dims, shape))]


@handles(primitives.broadcast_in_dim_p)
def _broadcast(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, shape = values[0], shape_of(eqn.outvars[0])
    kept = eqn.params["broadcast_dimensions"]
    if not isinstance(w, Weight) or w.shape != tuple(shape[i] for i in kept) or _size(shape) != _size(w.shape):
        return unsupported(interpreter, eqn, values)  # not only new axes of size 1
    return [w.seen(reshape_view(shape, w.shape), reshape_dims(w.dims, shape))]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


@handles(primitives.convert_element_type_p)
def _cast(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, dtype = as_weight(*values), eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        return unsupported(interpreter, eqn, values)
    return [w.seen(cast_view(dtype), w.dims, dtype)]


@handles(primitives.copy_p)
def _copy(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    return values


def _same_place(eqn: JaxprEqn) -> View:
    """Evaluates the equation on a float array. Codes stay unchanged, where the caller placed them."""
    return View(str(eqn.primitive), lambda x: bind(eqn, [x])[0], lambda q: q, lambda: _nothing(eqn))


def _nothing(eqn: JaxprEqn) -> View:
    """For one layer of a stack that was placed as a whole: a scan slices what lies where it lies."""
    return View(str(eqn.primitive), lambda x: x, lambda q: q, lambda: _nothing(eqn))


@handles(primitives.sharding_constraint_p, checkpoint_name)
def _placed(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w = as_weight(*values)
    return [w.seen(_same_place(eqn), w.dims)]


@handles(reshard)
def _resharded(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Where an array goes on a mesh of explicit axes; operations run with automatic ones, and constrain it there.

    JAX runs some operations with automatic axes itself: then every array of the leaf goes over to those.
    """
    w, placed = as_weight(*values), eqn.params["dst_sharding"]
    if not interpreter.planning and AxisType.Explicit not in (placed.mesh.axis_types or ()):
        params = {**eqn.params, "dst_sharding": placed.update(spec=PartitionSpec())}
        cast = lambda x: eqn.primitive.bind(x, **params)  # noqa: E731
        return [dataclasses.replace(w, leaf=jax.tree.map(cast, w.leaf), state=jax.tree.map(cast, w.state))]
    place = lambda x: lax.with_sharding_constraint(x, placed.spec)  # noqa: E731
    return [w.seen(View("reshard", place, lambda q: q, lambda: _nothing(eqn)), w.dims)]


@handles(lax.stop_gradient)
def _every_leaf(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Frozen weights: codes and scales alike."""
    w = as_weight(*values)
    return [w.seen(_leafwise(eqn), w.dims)]


@handles(marked_varying)
def _marked(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """A weight of a shard_map that is equal on all devices, unless each device rounded it with its own key."""
    w = as_weight(*values)
    return [w.seen(_marking(str(eqn.primitive), eqn.params["axes"]), w.dims)]


def _marking(name: str, axes: tuple[str, ...]) -> View:
    def marked(x: PyTree) -> PyTree:
        return jax.tree.map(lambda v: marked_varying(v, axes), x)

    return View(name, marked, marked, lambda: _marking(name, axes))


def _leafwise(eqn: JaxprEqn) -> View:
    def apply(x: jax.Array) -> jax.Array:
        out = eqn.primitive.bind(x, **eqn.params)
        return out[0] if eqn.primitive.multiple_results else out

    return View(str(eqn.primitive), apply, lambda q: jax.tree.map(apply, q), lambda: _leafwise(eqn))


@handles(lax.optimization_barrier)
def _barrier(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Orders computations and computes nothing; a weight is computed by nobody."""
    others = [i for i, v in enumerate(values) if not isinstance(v, Weight)]
    if others and values[others[0]] is not ABSENT:
        for i, x in zip(others, lax.optimization_barrier([values[i] for i in others]), strict=True):
            values[i] = x
    return values


@handles(primitives.rev_p)
def _flip(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w = as_weight(*values)
    return [w.seen(flip_view(tuple(eqn.params["dimensions"])), w.dims)]


def _cut(w: Weight, cuts: list[tuple[int, int | jax.Array, int]]) -> Weight:
    """The weight through slices; a sliced axis is one atom of the new size."""
    dims = list(w.dims)
    for axis, _, size in cuts:
        if size != w.shape[axis]:
            axes = frozenset().union(*(atom.axes for atom in dims[axis]))
            dims[axis] = (Atom.new(axes, size),)
    return w.seen(slice_view(tuple(cuts)), tuple(dims))


@handles(primitives.slice_p)
def _slice(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, p = as_weight(*values), eqn.params
    if p["strides"] is not None and any(s != 1 for s in p["strides"]):
        return unsupported(interpreter, eqn, values)
    bounds = zip(p["start_indices"], p["limit_indices"], w.shape, strict=True)
    return [_cut(w, [(i, a, b - a) for i, (a, b, n) in enumerate(bounds) if b - a != n])]


@handles(jnp.unstack)
def _unstack(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Each index of an axis, by a slice and a reshape."""
    w, axis, shape = as_weight(*values), eqn.params["axis"], shape_of(eqn.outvars[0])
    rows = [_cut(w, [(axis, i, 1)] if w.shape[axis] > 1 else []) for i in range(w.shape[axis])]
    return [row.seen(reshape_view(shape, row.shape), reshape_dims(row.dims, shape)) for row in rows]


@handles(lax.split)
def _split(_: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, axis = as_weight(*values), eqn.params["axis"]
    sizes = [int(n) for n in eqn.params["sizes"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_cut(w, [(axis, start, n)] if n != w.shape[axis] else []) for start, n in zip(starts, sizes, strict=True)]


@handles(primitives.dynamic_slice_p)
def _dynamic_slice(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    w, sizes = values[0], eqn.params["slice_sizes"]
    if not isinstance(w, Weight):
        return unsupported(interpreter, eqn, values)
    starts: list[int | jax.Array] = []
    for start, v in zip(values[1:], eqn.invars[1:], strict=True):
        computed = 0 if interpreter.planning else as_array(start)  # a plan is the same for all starts
        starts.append(int(v.val) if isinstance(v, Literal) else computed)
    return [_cut(w, [(i, starts[i], n) for i, n in enumerate(sizes) if n != w.shape[i]])]
