"""Operands in one shape: ``[batch, rows, K]``, contraction-minor.

A contraction is brought to this form, multiplied by a kernel (`jaxquant.ops.select`) and brought back. `form` describes
an operand from shapes alone, so that a kernel can be chosen without arrays.
"""

from __future__ import annotations

import functools
import math
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.qtensor import Operand, QTensor, Scale, flat, scale_values
from jaxquant.core.qtypes import QType
from jaxquant.core.types import TreeDef
from jaxquant.ops.axes import Axes
from jaxquant.ops.quantized_matrix import SHIFTED, TWO_LEVEL, Matrix, Packed, multiplied, planes_in_byte, shifted_by_128
from jaxquant.ops.trained import TrainedTensor

__all__ = ["Form", "canonical", "form", "matrix", "packed"]

Form = Matrix | Packed | jax.ShapeDtypeStruct | None
"""The result of `canonical` with shapes and dtypes in place of arrays; `jax.ShapeDtypeStruct` is a float array."""


def packed(x: Operand, axes: Axes) -> Packed | None:
    """A packed QTensor, or one of unsigned 8-bit codes, in canonical form with its stored bytes.

    None for any other QTensor, or if the contracted axes are not stored last.
    """
    if not isinstance(x, QTensor) or not axes.contract or x.permutation is not None:
        return None
    unsigned = (
        x.type.kind == "int" and x.type.bits == 8 and x.codes.dtype == jnp.uint8 and not isinstance(x, TrainedTensor)
    )
    if x.length is None and not unsigned:
        return None
    stored, n = x.stored_order, len(axes.contract)
    length = math.prod(x.shape[i] for i in axes.contract)
    if stored[-n:] != axes.contract or (x.length or length) * x.type.bits % 8:
        return None
    scale, multiplier = _stored_levels(x, axes)
    scale = _per_group(scale, x.shape, axes)
    multiplier = None if multiplier is None else _per_group(multiplier, x.shape, axes)
    zero_point = None if x.zero_point is None else _per_group(x.zero_point, x.shape, axes)
    offset = None if x.offset is None else _per_group(flat(x.offset), x.shape, axes)
    cuts = [v.shape[2] for v in (scale, multiplier, zero_point, offset) if v is not None]
    if scale is None or any(length // groups % planes_in_byte(x.type) for groups in cuts):
        return None
    if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer):
        zero_point = zero_point.astype(jnp.int32)
    order = [stored.index(i) for i in axes.batch + axes.rows]
    codes = jnp.transpose(x.codes, (*order, *range(x.ndim - n, x.ndim)))
    b, r = (math.prod(x.shape[i] for i in part) for part in (axes.batch, axes.rows))
    power_of_two = x.scale.dtype == jnp.float8_e8m0fnu
    return Packed(codes.reshape(b, r, -1), scale, zero_point, offset, multiplier, x.type, length, power_of_two)


def matrix(x: QTensor, axes: Axes) -> Matrix | None:
    """A quantized operand in canonical form; None if its scales do not form groups along the contraction."""
    x = x.unpermuted()
    qtype, scale, zero_point, offset = x.type, x.scale, x.zero_point, x.offset
    codes, shape, power_of_two = x.logical_codes(), x.shape, x.scale.dtype == jnp.float8_e8m0fnu
    symmetric = zero_point is None and offset is None
    scale, multiplier = _levels(scale, qtype, axes) if symmetric else (scale_values(scale), None)
    scale, multiplier, zero_point, offset = (
        None if v is None else _per_group(v, shape, axes) for v in (scale, multiplier, zero_point, flat(offset))
    )
    if scale is None:
        return None
    codes, rows_last = axes.flatten(codes), any(i in axes.rows for i in x.stored_order[-1:])
    if multiplier is not None:
        return Matrix(multiplied(codes.astype(jnp.int8), multiplier), scale, None, TWO_LEVEL, rows_last=rows_last)
    if qtype.kind == "int":
        if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer):
            zero_point = zero_point.astype(jnp.int32)
        if codes.dtype == jnp.uint8 and qtype.bits == 8:  # u8 operands fall off the fast path: shift to s8
            codes, zero_point = shifted_by_128(codes, zero_point, scale)
            qtype = SHIFTED
        else:
            codes = codes.astype(jnp.int8)
    return Matrix(codes, scale, zero_point, qtype, offset, rows_last, power_of_two)


def canonical(x: Operand, axes: Axes) -> Matrix | Packed | jax.Array | None:
    """An operand in canonical form: `Packed` if its codes are packed, a float array flattened; None as for `matrix`."""
    return packed(x, axes) or matrix(x, axes) if isinstance(x, QTensor) else axes.flatten(x)


def form(x: Operand, axes: Axes, *, whole: bool = False) -> Form:
    """`canonical` evaluated on shapes, without touching arrays.

    Args:
      x: the operand; its arrays are not touched.
      axes: its axes.
      whole: return one code per element, as `matrix` does, even where codes are packed.
    """
    leaves, tree = jax.tree.flatten(x)
    return _form(tree, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves), axes, whole)


@functools.lru_cache(maxsize=1024)
def _form(tree: TreeDef, leaves: tuple[tuple[tuple[int, ...], np.dtype], ...], axes: Axes, whole: bool) -> Form:
    x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(lambda x: matrix(x, axes) if whole and isinstance(x, QTensor) else canonical(x, axes), x)


def _per_group(value: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array | None:
    """A per-block value as [B or 1, R or 1, G]; None if its blocks are not consecutive runs of K."""
    blocks = [n // s for n, s in zip(shape, value.shape, strict=True)]

    # Along batch and rows: one entry per index, or a single entry.
    def spread(value: jax.Array, part: tuple[int, ...]) -> jax.Array:
        if all(value.shape[i] == 1 for i in part):
            return value
        for i in part:
            if value.shape[i] != shape[i]:
                value = jnp.repeat(value, blocks[i], axis=i)
        return value

    value = spread(spread(value, axes.batch), axes.rows)
    # Along K: single blocks, then one axis in any blocks, then whole axes.
    inner = list(axes.contract)
    while inner and value.shape[inner[-1]] == 1:
        inner.pop()
    if any(value.shape[i] != shape[i] for i in inner[:-1]):
        return None
    return axes.flatten_scale(value)


def _levels(scale: Scale, qtype: QType, axes: Axes) -> tuple[jax.Array, jax.Array | None]:
    """A scale as (real scales, None), or where it is two-level as (scales per row, int8 multipliers per group).

    A two-level scale is a QTensor of symmetric integers with one scale per row; its products with the codes fit int8.
    """
    if _is_two_level(scale, axes) and scale.type.kind == "int" and qtype.kind == "int":
        reach = max(-qtype.qmin, qtype.qmax) * max(-scale.type.qmin, scale.type.qmax)
        if reach <= 127:
            return scale_values(scale.scale), scale.logical_codes().astype(jnp.int8)
    return scale_values(scale), None


def _is_two_level(scale: Scale, axes: Axes) -> TypeGuard[QTensor]:
    """Whether a scale is a multiplier per group times one number per row, without an offset."""
    if not isinstance(scale, QTensor) or isinstance(scale.scale, QTensor) or not scale.symmetric:
        return False
    return all(scale.scale.shape[i] == 1 for i in axes.contract)


def _stored_levels(x: QTensor, axes: Axes) -> tuple[jax.Array, jax.Array | None]:
    """As `_levels`, and also separates fp8 multipliers of non-integer codes, which are decoded block by block."""
    if not x.symmetric:
        return scale_values(x.scale), None
    scale = x.scale
    if x.type.kind != "int" and _is_two_level(scale, axes) and scale.type.kind == "float" and not scale.type.packed:
        return scale_values(scale.scale), scale.logical_codes()
    return _levels(x.scale, x.type, axes)
