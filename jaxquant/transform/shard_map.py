"""The handler of `jax.shard_map`: weights of a function that is written for one device's shard of them.

A weight is quantized on the outside, where all of it is known, and cut into shards with the spec that the function
gives for the float array: codes are cut as the array is, scales and zero points where their blocks are. Inside, the
shard of a QTensor is a QTensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.types import PyTree
from jaxquant.ops.shardings import Cut, leaf_specs, whole_blocks
from jaxquant.ops.trained import TrainedTensor
from jaxquant.transform import primitives
from jaxquant.transform.calls import absent, floats
from jaxquant.transform.interpreter import Interpreter, handles
from jaxquant.transform.primitives import shape_of
from jaxquant.transform.weights import Atom, Value, Weight

__all__: list[str] = []


@handles(jax.shard_map)
def _shard_map(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    p = eqn.params
    mesh, closed = p["mesh"], primitives.closed(p["jaxpr"])
    cuts = [Cut.of(mesh, spec, len(shape_of(v))) for spec, v in zip(p["in_specs"], eqn.invars, strict=True)]
    if interpreter.planning:
        values = [_shard(v, v.leaf, cut) if isinstance(v, Weight) else v for v, cut in zip(values, cuts, strict=True)]
        return absent(interpreter, interpreter.run(closed, values), "shard_map")
    if interpreter.collect is not None:
        paths = tuple(v.path for v in values if isinstance(v, Weight))
        todo = "Calibrate the same function without its shard_map, with this plan"
        raise quant_error("calibrate", "in a shard_map each device sees a part of the inputs", todo=todo, paths=paths)
    arrays, specs = [], []
    for value, cut, spec in zip(values, cuts, p["in_specs"], strict=True):
        if isinstance(value, Weight):
            leaf = interpreter.operand(value)
            leaf = _each(leaf, lambda q, cut=cut: whole_blocks(q.apart(), cut)) if isinstance(leaf, QTensor) else leaf
            arrays.append((leaf, value.state))
            specs.append((leaf_specs(leaf, cut), jax.tree.map(lambda _: PartitionSpec(), value.state)))
        else:
            arrays.append(value)
            specs.append(spec)

    def body(arrays: list[PyTree]) -> list[Value]:
        inner = [
            _inside(v, a, s, cut, check=p["check_vma"]) if isinstance(v, Weight) else a
            for v, a, s, cut in zip(values, arrays, specs, cuts, strict=True)
        ]
        return floats(interpreter, interpreter.child().run(closed, inner), "shard_map")

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]),
        check_vma=p["check_vma"],
    )(arrays)


def _each(q: QTensor, change: Callable[[QTensor], QTensor]) -> QTensor:
    """``change`` of a QTensor, and of nothing else of one that trains."""
    return TrainedTensor(change(q), q.real) if isinstance(q, TrainedTensor) else change(q)


def _inside(outer: Weight, arrays: PyTree, specs: PyTree, cut: Cut, *, check: bool) -> Weight:
    """The weight on one device."""
    leaf, state = arrays
    if isinstance(leaf, QTensor):
        leaf = cut.local(leaf)
    if check:  # what is equal on all devices (a scale, say) must be marked as the float shard is
        leaves, structure = jax.tree.flatten(leaf)
        marked = [_varying(cut.names, x, s) for x, s in zip(leaves, jax.tree.leaves(specs[0]), strict=True)]
        leaf = jax.tree.unflatten(structure, marked)
    return dataclasses.replace(_shard(outer, leaf, cut), state=state)


def _varying(names: tuple[str, ...], x: jax.Array, spec: PartitionSpec) -> jax.Array:
    own = {name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))}
    return primitives.marked_varying(x, [name for name in names if name not in own])


def _shard(outer: Weight, leaf: Operand | None, cut: Cut) -> Weight:
    dims = tuple(_cut(dim, n) for dim, n in zip(outer.dims, cut.parts, strict=True))
    return dataclasses.replace(outer, leaf=leaf, dims=dims, steps=())


def _cut(dim: tuple[Atom, ...], parts: int) -> tuple[Atom, ...]:
    """The atoms of a shard of an axis: its outermost atom is cut, if that holds all cuts."""
    if parts == 1:
        return dim
    first = dim[0]
    if first.size % parts == 0:
        return (dataclasses.replace(first, size=first.size // parts), *dim[1:])
    axes, size = frozenset().union(*(atom.axes for atom in dim)), math.prod(atom.size for atom in dim)
    return (Atom.new(axes, size // parts),)
