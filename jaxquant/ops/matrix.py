"""Quantized operands in one shape: ``[batch, rows, K]``, contraction-minor.

Every contraction is brought to this form, multiplied by a formulation (`jaxquant.ops.formulation`) and brought back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.affine import Encoded
from jaxquant.core.codec import codes_of, values_of
from jaxquant.core.qtensor import QTensor, flat, scale_values
from jaxquant.core.qtypes import QType

__all__ = ["Axes", "Matrix", "matrix"]

_SHIFTED = QType("uint8 - 128", "int", 8, -128, 127)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one operand of a contraction, in the order of the canonical form."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    contract: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, batch: tuple[int, ...], contract: tuple[int, ...]) -> Axes:
        """Axes of an operand of rank ``ndim``; whatever is neither batch nor contracted is a row."""
        return cls(batch, tuple(i for i in range(ndim) if i not in batch and i not in contract), contract)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, as the canonical form has them."""
        return self.batch + self.rows + self.contract

    def flatten(self, x: jax.Array) -> jax.Array:
        """``[batch, rows, K]``."""
        x = jnp.transpose(x, self.order)
        nb, nr = len(self.batch), len(self.rows)
        return x.reshape(math.prod(x.shape[:nb]), math.prod(x.shape[nb : nb + nr]), math.prod(x.shape[nb + nr :]))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized matrix, or a stack of them.

    Attributes:
      codes: [B, R, K]; int8 for integer types (unsigned 8-bit codes are shifted by 128), else the type's own codes.
      scale: [B or 1, R or 1, G]: real scales, one per group of K / G consecutive codes; float32 (float64 if it was).
      zero_point: int32 (float for some imported tensors) of the scale's shape, or None.
      qtype: the number type.
      offset: real units added to each group, of the scale's shape, or None.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    qtype: QType
    offset: jax.Array | None = None

    @property
    def groups(self) -> int:
        """G."""
        return self.scale.shape[2]

    @property
    def integer(self) -> bool:
        """Whether products of codes are exact integers, and all there is."""
        whole = self.zero_point is None or jnp.issubdtype(self.zero_point.dtype, jnp.integer)
        return self.qtype.kind == "int" and whole and self.offset is None

    @property
    def minifloat(self) -> bool:
        """Whether products of codes are exact in float32, with one scale for the whole row."""
        return self.qtype.kind == "float" and self.groups == 1 and self.zero_point is None and self.offset is None

    @property
    def reach(self) -> int:
        """The largest magnitude of ``code - zero_point``."""
        if self.zero_point is not None:
            return int(self.qtype.qmax - self.qtype.qmin)
        return int(max(-self.qtype.qmin, self.qtype.qmax))

    def values(self, dtype: Any) -> jax.Array:
        """The real matrix [B, R, K]."""
        b, r, k = self.codes.shape
        split = self.codes.reshape(b, r, self.groups, k // self.groups)
        values = values_of(split, self.qtype, dtype)
        if self.zero_point is not None:
            values = values - self.zero_point[..., None].astype(dtype)
        values = values * self.scale[..., None].astype(dtype)
        if self.offset is not None:
            values = values + self.offset[..., None].astype(dtype)
        return values.reshape(b, r, k)


def _per_group(value: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array | None:
    """A per-block value as [B or 1, R or 1, G]; None if its blocks are not consecutive runs of K."""
    blocks = [n // s for n, s in zip(shape, value.shape, strict=True)]

    # Along batch and rows: one entry per index, or one for all.
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
    return axes.flatten(value)


def matrix(x: QTensor | tuple[Encoded, QType], axes: Axes) -> Matrix | None:
    """A quantized operand in canonical form; None if its scales do not form groups along the contraction."""
    offset = None
    if isinstance(x, QTensor):
        x = x.unpermuted()
        qtype, scale, zero_point, offset = x.type, x.scale, x.zero_point, x.offset
        codes, shape = x.logical_codes(), x.shape
    else:
        (values, scale, zero_point), qtype = x
        codes, shape = codes_of(values, qtype), values.shape
    scale = _per_group(scale_values(scale), shape, axes)
    if scale is None:
        return None
    if zero_point is not None:
        zero_point = _per_group(zero_point, shape, axes)
    if offset is not None:
        offset = _per_group(flat(offset), shape, axes)
    codes = axes.flatten(codes)
    if qtype.kind == "int":
        if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer):
            zero_point = zero_point.astype(jnp.int32)
        if codes.dtype == jnp.uint8 and qtype.bits == 8:  # u8 operands fall off the fast path: shift to s8
            codes = (codes ^ jnp.uint8(128)).astype(jnp.int8)
            zero_point = jnp.full(scale.shape, -128, jnp.int32) if zero_point is None else zero_point - 128
            qtype = _SHIFTED
        else:
            codes = codes.astype(jnp.int8)
    return Matrix(codes, scale, zero_point, qtype, offset)
