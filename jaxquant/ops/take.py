"""`take`: rows of a quantized table, dequantized after they are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxquant.core.arithmetic import nan_where
from jaxquant.core.blocks import block_shape, negative_axes
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.indices import widened
from jaxquant.core.jitted import jitted
from jaxquant.core.qtensor import QTensor, dequantize, from_codes
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.ops.operands import as_array, check_operand, check_spec

__all__ = ["take", "taken"]


def take(
    a: ArrayLike | QTensor,
    indices: ArrayLike,
    axis: int | None = None,
    *,
    mode: str | None = None,
    fill_value: Any = None,
    spec: OpSpec | None = None,
    reduce_axes: Sequence[int] | int = (-1,),
) -> jax.Array:
    """`jax.numpy.take` from a table that may be quantized: an embedding lookup.

    Codes (and scales) are gathered first and only the gathered rows are dequantized.

    Args:
      a: float array or QTensor, the table.
      indices: integer array.
      axis: the axis to index; required where the table is quantized.
      mode: ``"fill"`` (default), ``"clip"`` or ``"wrap"``, as for `jax.numpy.take`; out-of-bounds rows are filled with
        ``fill_value`` (default NaN).
      fill_value: see ``mode``.
      spec: its ``weight`` fake-quantizes a float table (straight-through gradient). There is no activation to quantize.
      reduce_axes: with ``spec``: axes of the table that share a scale.

    Returns:
      Array of a's (dequantized) dtype; axis replaced by the axes of ``indices``.

    Raises:
      QuantError: on indices that are not integers, a missing or bad axis, or a QTensor that does not agree with spec.

    Gradient: straight through for a float table; with respect to the scales for a QTensor.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import ops
      >>> table = jq.quantize(jnp.eye(4), jq.QuantSpec("int8"), reduce_axes=(-1,))
      >>> ops.take(table, jnp.array([2, 0]), axis=0)
      Array([[0., 0., 1., 0.],
             [1., 0., 0., 0.]], dtype=float32)
    """
    table, weight = as_array("take", "a", a), check_spec("take", spec).weight
    check_operand("take", "table (a)", table, weight)
    if not isinstance(table, QTensor) and weight is None:
        return jnp.take(table, indices, axis=axis, mode=mode, fill_value=fill_value)
    places = as_array("take", "indices", indices)
    if isinstance(places, QTensor) or not jnp.issubdtype(places.dtype, jnp.integer):
        raise quant_error("take", "indices must be integers", todo="Cast them", indices=places)
    known = isinstance(axis, int | np.integer) and not isinstance(axis, bool)
    if axis is None or not known or not -table.ndim <= axis < table.ndim:
        todo = f"Name one from {-table.ndim} to {table.ndim - 1}"
        raise quant_error("take", "a quantized table needs an axis to index", todo=todo, axis=axis, shape=table.shape)
    if mode not in (None, "fill", "clip", "wrap"):
        raise quant_error("take", "unknown mode", todo="Use 'fill', 'clip' or 'wrap'", mode=mode)
    along: int = int(axis) % table.ndim
    shape = table.shape[:along] + places.shape + table.shape[along + 1 :]
    if table.shape[along] == 0 and places.size:
        todo = "Pass a table with rows, or no indices"
        raise quant_error("take", "there is nothing to index", todo=todo, axis=axis, shape=table.shape)
    if 0 in shape:
        return jnp.zeros(shape, table.dtype)
    # Few programs, also in eager use; values have their own, see `dequantize`.
    if isinstance(table, QTensor):
        found, inside = (_looked_up if table.unpermuting_adds else _look_up)(table, places, along, mode)
        out = dequantize(found)
    else:
        assert weight is not None
        rows, inside = _resolved(places, table.shape[along], mode)
        out = _fake_quantized(table, rows.reshape(-1), along, weight, reduce_axes)
    if mode not in (None, "fill"):
        return out.reshape(shape)
    fill = np.nan if fill_value is None else fill_value
    is_nan = not isinstance(fill, jax.Array) and np.isnan(fill)
    return _filled(out, inside, None if is_nan else jnp.asarray(fill, out.dtype), along)


def _looked_up(q: QTensor, indices: jax.Array, axis: int, mode: str | None) -> tuple[QTensor, jax.Array]:
    """The QTensor of the rows at indices, and whether each index was in bounds."""
    rows, inside = _resolved(indices, q.shape[axis], mode)
    return _gather(q, rows.reshape(-1), axis), inside


_look_up = jitted(static_argnums=(2, 3))(_looked_up)


@jitted(static_argnums=3)
def _filled(out: jax.Array, inside: jax.Array, fill: jax.Array | None, axis: int) -> jax.Array:
    """The result, of rows, and of ``fill``, or NaN, where an index was out of bounds."""
    shape = out.shape[:axis] + inside.shape + out.shape[axis + 1 :]
    inside = inside.reshape([-1 if i == axis else 1 for i in range(out.ndim)])
    out = nan_where(~inside, out) if fill is None else jnp.where(inside, out, fill)
    return out.reshape(shape)


def _resolved(indices: jax.Array, size: int, mode: str | None) -> tuple[jax.Array, jax.Array]:
    """Indices moved into bounds, in int32 at least, and whether each was in bounds (or clipped by ``mode``)."""
    if mode == "wrap":
        indices = widened(indices) if indices.dtype.itemsize < 4 else indices
        indices = indices % np.asarray(size, indices.dtype)
    indices = widened(indices)
    inside = (indices >= -size) & (indices < size)
    if mode in (None, "fill"):
        indices = jnp.where(indices < 0, indices + size, indices)
    return jnp.clip(indices, 0, size - 1), inside


def _fake_quantized(
    a: jax.Array, rows: jax.Array, axis: int, spec: QuantSpec, reduce_axes: Sequence[int] | int
) -> jax.Array:
    axes = negative_axes(reduce_axes, a.ndim, function="take", shape=a.shape)
    block = block_shape(a.shape, spec.granularity, axes, function="take")
    # A scale that several rows share depends on rows that are not looked up.
    if block[axis] > 1 or axis - a.ndim in axes or spec.type.scale_format == "e4m3":
        return jnp.take(fake_quant(a, spec, reduce_axes=axes), rows, axis=axis, mode="clip")
    return fake_quant(jnp.take(a, rows, axis=axis, mode="clip"), spec, reduce_axes=axes)


@Replaceable
def taken(codes: jax.Array, indices: jax.Array, *, axis: int) -> jax.Array:
    """Codes at valid indices along an axis."""
    return jnp.take(codes, indices, axis=axis, mode="clip")


def _gather(q: QTensor, rows: jax.Array, axis: int) -> QTensor:
    """The QTensor of the rows at valid indices."""

    def of_rows(value: Any) -> Any:
        """Scales or zero points of the gathered rows."""
        if value is None or value.shape[axis] == 1:
            return value
        found = rows // (q.shape[axis] // value.shape[axis])
        if isinstance(value, QTensor):
            return _gather(value, found, axis)
        return jnp.take(value, found, axis=axis, mode="clip")

    if q.split == axis - q.ndim:
        q = q.whole()
    if axis in q.stored_order[q.ndim - q.joined :]:
        q = q.unjoined()
    if axis == q.permuted_axis:
        q = q.unpermuted()
    stored = q.stored_order.index(axis)
    scale, zero_point, offset = map(of_rows, (q.scale, q.zero_point, q.offset))
    if q.length is not None and stored == q.ndim - 1:  # packed along the very axis
        codes = jnp.take(q.logical_codes(), rows, axis=axis, mode="clip")
        return from_codes(codes, scale, zero_point, offset, qtype=q.qtype, dtype=q.dtype)
    stored += q.block_axis is not None and q.block_axis < stored
    codes = taken(q.codes, rows, axis=stored)
    return q.replace(codes=codes, scale=scale, zero_point=zero_point, offset=offset, permutation=of_rows(q.permutation))
