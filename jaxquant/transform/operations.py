"""Handlers of the operations that have a quantized form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var, primitives
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant import ops
from jaxquant.core.indices import widened
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.axes import Axes
from jaxquant.ops.dot import contract
from jaxquant.ops.placed import Placed
from jaxquant.ops.rowwise import Produced
from jaxquant.ops.shardings import explicit_sharding
from jaxquant.ops.trained import TrainedTensor
from jaxquant.transform.backward_pass import handing_kept
from jaxquant.transform.calls import arrays_of, inside
from jaxquant.transform.interpreter import Handler, Interpreter, Misfit, Tally, handles, key_of, unsupported
from jaxquant.transform.masks import along
from jaxquant.transform.plan import Item
from jaxquant.transform.primitives import automatic, dtype_of, marked_varying, shape_of, varying_axes
from jaxquant.transform.products import product_name
from jaxquant.transform.statistics import Inputs, Rows
from jaxquant.transform.weights import (
    ABSENT,
    Value,
    Weight,
    as_array,
    as_weight,
    rounded_activation,
    trained_activation,
    trains,
)

__all__: list[str] = []


def _activation(
    interpreter: Interpreter, weight: Weight, x: jax.Array, axes: Sequence[int], inputs: Callable[[Item], Inputs]
) -> tuple[Operand, dict[str, Any]]:
    """The other operand, contracted over ``axes``, and how an op treats it: its spec and static range.

    With learned steps it is quantized here. Calibration leaves it in float and looks at it.
    """
    item = interpreter.items.get(weight.path)
    if item is None:
        return x, {}
    if interpreter.collect is not None:
        interpreter.add_stats(interpreter.collect(item, functools.partial(inputs, item)))
    if interpreter.calibrating or item.spec.act is None:
        return x, {}

    def marked(
        state: Mapping[str, PyTree],
    ) -> dict[str, jax.Array]:
        # In a shard_map a range varies as the array does: their gradients do, too.
        return jax.tree.map(lambda v: marked_varying(v, varying_axes(x)), dict(state))

    out: dict[str, Any] = {"spec": dataclasses.replace(item.spec, weight=None)}
    grad, key = item.spec.grad, interpreter.rounding_key
    if grad is not None and grad.rounding == "stochastic" and key is not None:
        out["key"] = key_of(key, weight.path)
    alone = item.spec.weight is None and not isinstance(weight.leaf, QTensor)
    steps = weight.steps_of("act")
    if steps is not None:
        quantized = trained_activation(x, marked(steps), item.spec.act, tuple(axes))
        # Beside a float weight it is a float array with the values of its codes.
        return (quantized.differentiable, {}) if alone else (quantized, out)
    scale = zero_point = None
    if item.spec.act.static:
        given = marked(weight.state)
        scale, zero_point = given["scale"], given.get("zero_point")
    rounding = interpreter.rounding_key_of(weight.path, "act", item.spec.act)
    if rounding is not None:
        quantized = rounded_activation(x, item.spec.act, tuple(axes), rounding, scale, zero_point)
        return (quantized.differentiable, {}) if alone else (quantized, out)
    if item.spec.act.static:
        out["act_scale"], out["act_zero_point"] = scale, zero_point
    return x, out


def _inputs(item: Item, rows: Rows, columns: Callable[[], Rows] | None = None) -> Inputs:
    """Inputs of which the rows are the channels, and the columns too unless those are others."""
    whole = rows.values.shape[-1] == _columns(item) or columns is not None
    return Inputs(rows, rows if whole else None, columns if columns is not None else (lambda: rows) if whole else None)


def _rows(interpreter: Interpreter, x: jax.Array, axes: Axes) -> Rows:
    """An activation in rows, with the rows that the mask counts."""
    if interpreter.mask is None:
        return Rows(axes.flatten(x))
    return Rows(axes.flatten(x), axes.flatten(_counted(interpreter, x, axes.contract))[..., 0])


def _counted(interpreter: Interpreter, x: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """The mask along an activation, as an array of its shape."""
    assert interpreter.mask is not None
    mask = along(interpreter.mask, x.shape)
    shapes = f"{tuple(x.shape)}, the mask {tuple(interpreter.mask.shape)}"
    if mask is None:
        raise Misfit(f"its input does not begin with the axes of the mask: it has shape {shapes}")
    if any(mask.shape[i] > 1 for i in contracted):
        raise Misfit(f"it contracts an axis of the mask: its input has shape {shapes}")
    return jnp.broadcast_to(mask, x.shape)


def _columns(item: Item) -> int:
    """How many values of the weight one output sums over."""
    return math.prod(item.shape[axis] for axis in item.reduce_axes)


def _partitioned(handler: Handler) -> Handler:
    """A handler that runs with automatic axes on a mesh of explicit ones.

    Operations on codes reshape and multiply by themselves, and the program names no shardings for that. The results are
    placed where the program's own equation places them.
    """

    @functools.wraps(handler)
    def run(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        if interpreter.planning or (placed := explicit_sharding(eqn.outvars[0].aval)) is None:
            return handler(interpreter, eqn, values)
        if "out_sharding" in eqn.params:
            eqn = eqn.replace(params={**eqn.params, "out_sharding": None})

        def body(
            arrays: list[PyTree], mask: jax.Array | None, key: jax.Array | None
        ) -> tuple[list[Value], dict[str, Tally]]:
            inner = interpreter.child()
            inner.mask, inner.rounding_key, inner.produced = mask, key, None
            results = handler(inner, eqn, [inside(v, a) for v, a in zip(values, arrays, strict=True)])
            return results, inner.stats

        arrays, everywhere = [arrays_of(v) for v in values], NamedSharding(placed.mesh, PartitionSpec())
        results, stats = automatic(body, ([placed], everywhere))(arrays, interpreter.mask, interpreter.rounding_key)
        interpreter.add_stats(stats)
        return results

    return run


def _as_it_stands(eqn: JaxprEqn, values: Sequence[Operand]) -> list[Value]:
    """The primitive on these values, under the mesh that is set now: an equation would bring its own."""
    return [eqn.primitive.bind(*values, **eqn.params)]


def _handing_kept(handler: Handler) -> Handler:
    """A handler of products that quantizes weights in training again in the backward pass."""

    @functools.wraps(handler)
    def run(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        if interpreter.planning or interpreter.collect is not None or not any(map(trains, values)):
            return handler(interpreter, eqn, values)
        return handing_kept(lambda: handler(interpreter, eqn, values))

    return run


def _of_reals(handler: Handler) -> Handler:
    """A handler of products that are real: `lax` multiplies weights by complex numbers too.

    It also multiplies them by integers and by floats of 8 bits, which no activation is quantized from: these are cast.
    """

    @functools.wraps(handler)
    def run(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        dtype = dtype_of(eqn.outvars[0])
        if any(isinstance(v, Weight) for v in values) and not jnp.issubdtype(dtype, jnp.floating):
            return unsupported(interpreter, eqn, values, f"in a product of dtype {dtype}")
        if not interpreter.planning:
            left, right = eqn.invars[:2]
            values = [_real(values[0], right), _real(values[1], left), *values[2:]]
        return handler(interpreter, eqn, values)

    return run


def _real(value: Value, other: Var | Literal) -> Value:
    """An operand in the dtype of the other one, if it is an array of none that arithmetic promotes to."""
    if isinstance(value, Weight):
        return value
    x = as_array(value)
    narrow = not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1
    return x.astype(dtype_of(other)) if narrow else x


@handles(primitives.dot_general_p)
@_partitioned
@_of_reals
@_handing_kept
def _dot_general(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    weights = [side for side, v in enumerate(values) if isinstance(v, Weight)]
    if len(weights) == 2:
        return unsupported(interpreter, eqn, values)
    if not weights:
        return _product(interpreter, eqn, values)
    (side,) = weights
    weight = as_weight(values[side])
    p = eqn.params
    contract, batch = p["dimension_numbers"]
    if interpreter.planning:
        shape = shape_of(eqn.invars[1 - side])
        rows = math.prod(n for i, n in enumerate(shape) if i not in contract[1 - side] + batch[1 - side])
        interpreter.record(weight, "dot_general", tuple(contract[side]), rows=rows)
        return [ABSENT]
    x = as_array(values[1 - side])
    operands: list[Operand] = [x, x]
    if not interpreter.planned(weight, tuple(contract[side])):
        operands[side] = interpreter.real(weight)
        return _as_it_stands(eqn, operands)
    operands[side] = interpreter.operand(weight)
    channels = [i for _, i in sorted(zip(contract[side], contract[1 - side], strict=True), key=weight_order(weight))]
    if interpreter.entering is not None:
        operands[1 - side] = x = interpreter.entering(weight, x, tuple(channels))
    rows = Axes.of(len(shape_of(eqn.invars[1 - side])), tuple(batch[1 - side]), tuple(channels))
    operands[1 - side], act = _activation(
        interpreter, weight, x, contract[1 - side], lambda item: _inputs(item, _rows(interpreter, x, rows))
    )
    if not isinstance(operands[side], QTensor) and not act:
        return _as_it_stands(eqn, operands)
    if side == 0 and act:  # an op takes the right operand for the weight
        return [_swapped(eqn, interpreter, operands, act)]
    produced = interpreter.produced if side == 1 and operands[0] is values[0] else None
    return [_multiplied(interpreter, eqn, operands, p["dimension_numbers"], **act, produced=produced)]


def _product(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """A product of two activations that the plan quantizes, or that planning has found."""
    products, name = interpreter.products, product_name(interpreter.scope)
    assert products is not None
    left, right = (shape_of(v) for v in eqn.invars)
    products.met.setdefault(name, (left, right))
    if products.specs is None:
        return [ABSENT]
    operands = [as_array(value) for value in values]
    return [_multiplied(interpreter, eqn, operands, eqn.params["dimension_numbers"], spec=products.specs[name])]


def _multiplied(
    interpreter: Interpreter,
    eqn: JaxprEqn,
    operands: Sequence[Operand],
    numbers: lax.DotDimensionNumbers,
    *,
    spec: OpSpec | None = None,
    act_scale: jax.Array | None = None,
    act_zero_point: jax.Array | None = None,
    key: jax.Array | None = None,
    swapped: bool = False,
    produced: Produced | None = None,
) -> jax.Array:
    """`jaxquant.ops.dot_general` of the operands of an equation, or of these ``swapped``, placed as its types say."""
    left, right = ((explicit_sharding(v.aval), len(shape_of(v))) for v in eqn.invars[:2])
    lhs, rhs = operands
    result = explicit_sharding(eqn.outvars[0].aval)
    placed = Placed.of(right, left, numbers) if swapped else Placed.of(left, right, numbers, result)
    precision = _precision(interpreter, eqn.params["precision"])
    return contract(
        "dot_general", lhs, rhs, numbers, precision, dtype_of(eqn.outvars[0]),
        spec, act_scale, act_zero_point, key=key, placed=placed, produced=produced,
    )  # fmt: skip


def weight_order(weight: Weight) -> Callable[[tuple[int, int]], list[tuple[int, int]]]:
    """A sort key for ``(axis of the view, partner)``: the order of the axes in the parameter.

    Atoms that one axis was cut into are numbered from the outermost.
    """
    return lambda pair: [(min(atom.axes), atom.id) for atom in weight.dims[pair[0]]]


def _precision(interpreter: Interpreter, own: lax.PrecisionLike) -> lax.PrecisionLike:
    return own if interpreter.precision is None else interpreter.precision


def _swapped(eqn: JaxprEqn, interpreter: Interpreter, operands: list[Operand], act: dict[str, Any]) -> jax.Array:
    """A dot whose weight is on the left, as one with the weight on the right."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    out = _multiplied(interpreter, eqn, operands[::-1], ((rc, lc), (rb, lb)), swapped=True, **act)
    batch, rows = len(lb), operands[1].ndim - len(rc) - len(rb)
    order = [*range(batch), *range(batch + rows, out.ndim), *range(batch, batch + rows)]
    return jnp.transpose(out, order)


@handles(primitives.conv_general_dilated_p)
@_partitioned
@_of_reals
@_handing_kept
def _conv(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    weight = values[1]
    if not isinstance(weight, Weight) or isinstance(values[0], Weight):
        return unsupported(interpreter, eqn, values)
    p = eqn.params
    numbers = p["dimension_numbers"]
    contracted = tuple(i for i in range(weight.ndim) if i != numbers.rhs_spec[0])
    if interpreter.planning:
        places = math.prod(weight.shape[i] for i in numbers.rhs_spec[2:])
        window = (p["feature_group_count"], p["batch_group_count"], places)
        interpreter.record(weight, "conv_general_dilated", contracted, contraction_minor=False, window=window)
        return [ABSENT]
    x = as_array(values[0])
    if not interpreter.planned(weight, contracted):
        return _as_it_stands(eqn, [x, interpreter.real(weight)])
    kernel = interpreter.operand(weight)
    image, act = _activation(
        interpreter, weight, x, numbers.lhs_spec[1:], lambda item: _conv_inputs(interpreter, item, weight, x, p)
    )
    if not isinstance(kernel, QTensor) and not act:
        return _as_it_stands(eqn, [image, kernel])
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")
    out = ops.conv_general_dilated(
        image,
        kernel,
        **{name: p[name] for name in names},
        dimension_numbers=numbers,
        precision=_precision(interpreter, p["precision"]),
        preferred_element_type=dtype_of(eqn.outvars[0]),
        **act,
    )
    return [out]


def _conv_inputs(interpreter: Interpreter, item: Item, weight: Weight, x: jax.Array, p: dict[str, Any]) -> Inputs:
    """Channels are features; columns the features of each place of the window, in the order of the kernel's axes.

    A window counts if the mask leaves out nothing of it; what pads the image counts.
    """
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    features = _rows(interpreter, x, Axes.of(x.ndim, (), (numbers.lhs_spec[1],)))
    within = tuple(numbers.rhs_spec[1:])
    window = tuple(weight.shape[i] for i in within)
    if math.prod(window) != _columns(item) or any(s.name == "rev" for s in weight.steps) or p["batch_group_count"] > 1:
        return Inputs(features, features, None)

    around = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])

    def columns() -> Rows:
        patches = lax.conv_general_dilated_patches(
            jnp.transpose(x, numbers.lhs_spec),
            window[1:],
            *around,
            precision=lax.Precision.HIGHEST,
        )
        count = patches.shape[0]
        patches = patches.reshape(count, groups, *window, -1)  # [images, groups, features of a group, window.., places]
        order = sorted(range(len(within)), key=lambda i: weight_order(weight)((within[i], i)))
        patches = jnp.transpose(patches, (1, 0, patches.ndim - 1, *(2 + i for i in order)))
        patches = patches.reshape(groups, patches.shape[1] * patches.shape[2], math.prod(window))
        if interpreter.mask is None:
            return Rows(patches)
        counted = jnp.transpose(_counted(interpreter, x, (numbers.lhs_spec[1],)), numbers.lhs_spec)[:, :1]
        ones = jnp.ones((1, 1, *window[1:]), jnp.float32)
        left_out = lax.conv_general_dilated((~counted).astype(jnp.float32), ones, *around)
        return Rows(patches, jnp.broadcast_to(left_out.reshape(1, left_out.size) == 0, patches.shape[:2]))

    return Inputs(features, features, columns)


_MODES = {
    lax.GatherScatterMode.FILL_OR_DROP: "fill",
    lax.GatherScatterMode.CLIP: "clip",
    lax.GatherScatterMode.PROMISE_IN_BOUNDS: "clip",
}


class _Lookup(NamedTuple):
    """A gather that takes ``size`` neighbouring rows along ``axis`` from every start, and whole rows at that.

    Attributes:
      axis: the axis of the table that is indexed.
      column: the place of its starts in the last axis of the indices.
      size: 1 for `jnp.take`; a batched slice has any.
      order: the axes of the result as `jax.numpy.take` makes it, with the rows of a slice behind their start, in the
        order of the gather's.
    """

    axis: int
    column: int
    size: int
    order: tuple[int, ...]


def _lookup(eqn: JaxprEqn) -> _Lookup | None:
    """How a gather looks up rows, or None if it does something else."""
    p, table, indices = eqn.params, shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    d, sizes = p["dimension_numbers"], p["slice_sizes"]
    cut = {i for i, (n, s) in enumerate(zip(table, sizes, strict=True)) if n != s} | set(d.collapsed_slice_dims)
    if len(cut) != 1 or getattr(d, "operand_batching_dims", ()) or p["mode"] not in _MODES:
        return None
    (axis,), count = cut, len(indices) - 1
    if axis not in d.start_index_map or (len(d.start_index_map) > 1 and _MODES[p["mode"]] == "fill"):
        return None  # a start along a whole axis is clipped to 0, or drops what it starts
    offsets = iter(d.offset_dims)
    place: dict[int, int] = {}  # of an axis of take's result in the gather's
    batch = (i for i in range(len(shape_of(eqn.outvars[0]))) if i not in d.offset_dims)
    place.update((axis + i, next(batch)) for i in range(count))
    rows = 0 if d.collapsed_slice_dims else 1
    for i in range(len(table)):
        if i != axis:
            place[i if i < axis else i + count - 1 + rows] = next(offsets)
        elif rows:
            place[axis + count] = next(offsets)
    order = tuple(sorted(place, key=lambda i: place[i]))
    return _Lookup(axis, d.start_index_map.index(axis), sizes[axis], order)


@handles(primitives.gather_p)
@_partitioned
def _gather(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    weight = values[0]
    lookup = _lookup(eqn) if isinstance(weight, Weight) else None
    if lookup is None or not isinstance(weight, Weight):
        return unsupported(interpreter, eqn, values)
    if interpreter.planning:
        interpreter.record(weight, "take", tuple(i for i in range(weight.ndim) if i != lookup.axis))
        return [ABSENT]
    table, indices = interpreter.operand(weight), as_array(values[1])
    if isinstance(table, TrainedTensor):
        table = table.differentiable
    if not isinstance(table, QTensor):  # in float; XLA has no scatter by some narrow dtypes, for the gradient
        return _as_it_stands(eqn, [table, widened(indices)])
    mode, fill = _MODES[eqn.params["mode"]], eqn.params["fill_value"]
    starts, rows = widened(indices[..., lookup.column]), table.shape[lookup.axis]
    if mode == "clip":
        starts = jnp.clip(starts, 0, rows - lookup.size)
    else:  # what is negative here counts from nowhere, and ops.take, like jnp.take, counts from the end
        starts = jnp.where((starts < 0) | (starts > rows - lookup.size), rows, starts)
    if not eqn.params["dimension_numbers"].collapsed_slice_dims:
        every = jnp.arange(lookup.size, dtype=starts.dtype)
        starts = starts[..., None] + every.reshape((1,) * starts.ndim + (-1,))
    out = ops.take(table, starts, axis=lookup.axis, mode=mode, fill_value=fill)
    return [jnp.transpose(out, lookup.order)]


@handles(lax.ragged_dot)
@_partitioned
@_of_reals
@_handing_kept
def _ragged_dot(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    weight = values[1]
    p = eqn.params.get("ragged_dot_dimension_numbers")
    plain = p is not None and (
        p.dot_dimension_numbers == (((1,), (1,)), ((), ()))
        and tuple(p.lhs_ragged_dimensions) == (0,)
        and tuple(p.rhs_group_dimensions) == (0,)
    )
    if not isinstance(weight, Weight) or isinstance(values[0], Weight) or not plain:
        return unsupported(interpreter, eqn, values)
    if interpreter.planning:
        interpreter.record(weight, "ragged_dot", (1,))
        return [ABSENT]
    x, sizes, *rest = map(as_array, (values[0], *values[2:]))
    if not interpreter.planned(weight, (1,)):
        return _as_it_stands(eqn, [x, interpreter.real(weight), sizes, *rest])
    experts = interpreter.operand(weight)
    if interpreter.entering is not None:
        x = interpreter.entering(weight, x, (1,))
    rows, act = _activation(interpreter, weight, x, (1,), lambda item: _ragged_inputs(interpreter, item, x, sizes))
    if not isinstance(experts, QTensor) and not act:
        return _as_it_stands(eqn, [rows, experts, sizes, *rest])
    precision, dtype = _precision(interpreter, eqn.params["precision"]), dtype_of(eqn.outvars[0])
    return [ops.ragged_dot(rows, experts, sizes, precision=precision, preferred_element_type=dtype, **act)]


def _ragged_inputs(interpreter: Interpreter, item: Item, x: jax.Array, sizes: jax.Array) -> Inputs:
    if interpreter.mask is not None:
        raise Misfit("a ragged_dot has its rows in the order of the experts, which the mask does not know")
    return _inputs(item, Rows(x[None]), lambda: Rows(_by_expert(x, sizes)))


def _by_expert(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows of each expert [experts, rows, channels], 0 where another one works."""
    sizes = widened(sizes)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[None, :]
    mine = (row >= (ends - sizes)[:, None]) & (row < ends[:, None])
    return jnp.where(mine[..., None], x[None], 0)
