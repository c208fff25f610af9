"""`take`: rows of a quantized table, dequantized after they are gathered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import block_shape, negative_axes
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.qtensor import QTensor, dequantize, from_codes, scale_values
from jaxquant.core.specs import OpSpec
from jaxquant.ops.operands import as_array, operand_specs

__all__ = ["take"]


def take(
    a: Any,
    indices: Any,
    axis: int | None = None,
    *,
    mode: str | None = None,
    fill_value: Any = None,
    spec: OpSpec | None = None,
    reduce_axes: tuple[int, ...] = (-1,),
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
    a, indices = as_array("take", "a", a), jnp.asarray(indices)
    _, weight = operand_specs("take", indices, a, None if spec is None else OpSpec(weight=spec.weight), weight=1)
    if not isinstance(a, QTensor) and weight is None:
        return jnp.take(a, indices, axis=axis, mode=mode, fill_value=fill_value)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise quant_error("take", "indices must be integers", todo="Cast them", indices=indices)
    if axis is None or not -a.ndim <= axis < a.ndim:
        todo = f"Name one from {-a.ndim} to {a.ndim - 1}"
        raise quant_error("take", "a quantized table needs an axis to index", todo=todo, axis=axis, shape=a.shape)
    axis %= a.ndim
    if isinstance(a, QTensor):
        return _take_codes(a, indices, axis, mode, fill_value)
    assert weight is not None
    block = block_shape(a.shape, weight.granularity, weight.group_size, tuple(reduce_axes), function="take")
    axes = negative_axes(reduce_axes, a.ndim, function="take", shape=a.shape)
    if block[axis] > 1 or axis - a.ndim in axes or weight.type.scale_format == "e4m3":
        # Rows share a scale: it depends on rows that are not looked up.
        a = fake_quant(a, weight, reduce_axes=reduce_axes)
        return jnp.take(a, indices, axis=axis, mode=mode, fill_value=fill_value)
    rows = jnp.take(a, indices, axis=axis, mode=mode, fill_value=fill_value)
    # The reduced axes, in the gathered array: those after ``axis`` keep their distance from the end.
    shift = indices.ndim - 1
    moved = tuple(r if r + a.ndim > axis else r - shift for r in axes)
    return fake_quant(rows, weight, reduce_axes=moved)


def _take_codes(q: QTensor, indices: jax.Array, axis: int, mode: str | None, fill_value: Any) -> jax.Array:
    size, flat = q.shape[axis], indices.reshape(-1)
    shape = q.shape[:axis] + indices.shape + q.shape[axis + 1 :]
    if flat.size == 0:
        return jnp.zeros(shape, q.dtype)
    if mode == "wrap":
        flat = flat % size
    valid = (flat >= -size) & (flat < size)
    flat = jnp.clip(jnp.where(flat < 0, flat + size, flat) if mode in (None, "fill") else flat, 0, size - 1)

    def rows(value: Any) -> Any:
        """Scales or zero points of the gathered rows."""
        if value is None or value.shape[axis] == 1:
            return value
        return jnp.take(value, flat // (size // value.shape[axis]), axis=axis, mode="clip")

    scale, zero_point = rows(scale_values(q.scale)), rows(q.zero_point)
    stored = q.stored_order.index(axis)
    if q.length is not None and stored == q.ndim - 1:  # packed along the very axis
        codes = jnp.take(q.logical_codes(), flat, axis=axis, mode="clip")
        got = from_codes(codes, scale, zero_point, qtype=q.qtype, dtype=q.dtype)
    else:
        codes = jnp.take(q.codes, flat, axis=stored, mode="clip")
        got = QTensor(codes, scale, zero_point, qtype=q.qtype, dtype=q.dtype, minor=q.minor, length=q.length)
    out = dequantize(got)
    if mode in (None, "fill"):
        keep = valid.reshape([-1 if i == axis else 1 for i in range(out.ndim)])
        out = jnp.where(keep, out, jnp.asarray(jnp.nan if fill_value is None else fill_value, out.dtype))
    return out.reshape(shape)
