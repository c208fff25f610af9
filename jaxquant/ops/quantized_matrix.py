"""Quantized matrices ``[batch, rows, K]``, whose codes kernels multiply.

A `Matrix` has one code per element; a `Packed` keeps the stored bytes of a narrow weight. Both are pytrees, so that one
can be described by its shapes alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core.codec import from_bits, values_of
from jaxquant.core.packing import unpack
from jaxquant.core.qtypes import QType
from jaxquant.ops.pytrees import pytree

__all__ = ["SHIFTED", "TWO_LEVEL", "Matrix", "Packed", "multiplied", "planes_in_byte", "shifted_by_128"]

SHIFTED = QType("uint8 - 128", "int", 8, -128, 127)
"""The type of unsigned 8-bit codes that are shifted to int8."""

TWO_LEVEL = QType("code * multiplier", "int", 8, -128, 127)
"""The type of codes times the multipliers of two-level scales."""


class _Quantized:
    """Properties that follow from a quantized matrix's scales and type, common to packed and unpacked codes."""

    scale: jax.Array
    zero_point: jax.Array | None
    qtype: QType
    offset: jax.Array | None
    power_of_two: bool
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def groups(self) -> int:
        """G."""
        return self.scale.shape[2]

    @property
    def integer(self) -> bool:
        """Whether products of codes are exact integers, with no offset to add."""
        whole = self.zero_point is None or jnp.issubdtype(self.zero_point.dtype, jnp.integer)
        return self.qtype.kind == "int" and whole and self.offset is None

    @property
    def minifloat(self) -> bool:
        """Whether a row is short-significand numbers, unscaled or times one scale: fp8, fp4, MX formats."""
        plain = self.qtype.kind == "float" and self.zero_point is None and self.offset is None
        return plain and (self.groups == 1 or self.power_of_two)

    @property
    def one_scale(self) -> bool:
        """Whether a row is one scale times numbers that are exact in two bytes: integers up to 256, or fp8."""
        return self.groups == 1 and (self.minifloat or self.integer)

    def exact_in(self, dtype: DTypeLike) -> bool:
        """Whether a dtype of two bytes represents the `numbers` of a row exactly."""
        return self.one_scale or (self.minifloat and dtype == jnp.bfloat16)


@pytree("qtype", "rows_last", "power_of_two")
@dataclasses.dataclass(frozen=True)
class Matrix(_Quantized):
    """A quantized matrix, or a stack of them.

    Attributes:
      codes: [B, R, K]; int8 for integer types (unsigned 8-bit codes are shifted by 128), else the type's own codes. A
        block has the patterns of fp8, in uint8.
      scale: [B or 1, R or 1, G]: real scales, one per group of K / G consecutive codes; float32 (float64 if it was).
      zero_point: int32 (float for some imported tensors) of the scale's shape, or None.
      qtype: the number type.
      offset: real units added to each group, of the scale's shape, or None.
      rows_last: whether the codes come from an array stored as [B, K, R].
      power_of_two: whether every scale is a power of two.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    qtype: QType
    offset: jax.Array | None = None
    rows_last: bool = False
    power_of_two: bool = False
    multiplier: ClassVar[None] = None

    @property
    def reach(self) -> int:
        """The largest magnitude of ``code - zero_point``."""
        if self.zero_point is not None:
            return int(self.qtype.qmax - self.qtype.qmin)
        return int(max(-self.qtype.qmin, self.qtype.qmax))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, R, K]."""
        b, r, k = self.codes.shape
        return b, r, k

    @property
    def stored(self) -> jax.Array:
        """The stored codes, [B, R, codes or bytes]."""
        return self.codes

    @property
    def planes(self) -> int:
        """The number of interleaved parts in which `code_planes`, `int8` and `floats` return the matrix."""
        return 1

    @property
    def scales(self) -> jax.Array:
        """Real scales, one for each group: [B or 1, R or 1, G]."""
        return self.scale

    def values(self, dtype: DTypeLike) -> jax.Array:
        """The real matrix [B, R, K]."""
        return _real(self.codes, self.scale, self.zero_point, self.offset, self.qtype, dtype)

    def code_planes(self) -> list[jax.Array]:
        """The codes, in planes: elements 0, planes, 2 planes, ... of K, then 1, planes + 1, ..."""
        return [self.codes]

    def int8(self) -> list[Matrix]:
        """The matrix, in planes."""
        return [self]

    def floats(self) -> list[jax.Array]:
        """The real values in float32, in planes."""
        return [self.values(jnp.float32)]

    def numbers(self, dtype: DTypeLike) -> tuple[list[jax.Array], jax.Array | None]:
        """Returns (values, row_scale), or (dequantized, None) if values would be inexact in the dtype.

        Values and dequantized are lists of planes; row_scale is [B or 1, R or 1, 1].
        """
        if self.one_scale:
            return [_shifted(self.codes, self.zero_point, self.qtype, dtype)], self.scale
        return [self.values(jnp.float32).astype(dtype)], None


def _shifted(codes: jax.Array, zero_point: jax.Array | None, qtype: QType, dtype: DTypeLike) -> jax.Array:
    values = values_of(codes, qtype, dtype)
    return values if zero_point is None else values - zero_point.astype(dtype)


def _real(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    offset: jax.Array | None,
    qtype: QType,
    dtype: DTypeLike,
) -> jax.Array:
    b, r, k = codes.shape
    groups = scale.shape[2]
    if groups != 1:
        codes = codes.reshape(b, r, groups, k // groups)
        scale = scale[..., None]
        zero_point, offset = (None if v is None else v[..., None] for v in (zero_point, offset))
    values = _shifted(codes, zero_point, qtype, dtype) * scale.astype(dtype)
    if offset is not None:
        values = values + offset.astype(dtype)
    return values.reshape(b, r, k)


@pytree("qtype", "length", "power_of_two")
@dataclasses.dataclass(frozen=True)
class Packed(_Quantized):
    """A quantized matrix, or a stack of them, in stored form: packed (see `jaxquant.core.packing`), or in uint8.

    Codes of 1, 2 or 4 bits are unpacked in planes: a plane is one AND and one shift of the bytes. For 4 bits, the even
    elements of K are one plane and the odd ones the other; the other operand is split in the same way.

    Attributes:
      bytes: uint8 [B, R, bytes of a row].
      scale, zero_point, offset, qtype, power_of_two: as in `Matrix`.
      multiplier: int8 or fp8 [B or 1, R or 1, G], the inner level of two-level scales, or None. With an int8 multiplier
        there is one scale per row.
      length: K.
    """

    bytes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    multiplier: jax.Array | None
    qtype: QType
    length: int
    power_of_two: bool = False
    rows_last: ClassVar[bool] = False

    @property
    def groups(self) -> int:
        """G of the scales; multipliers in int8 are part of the codes."""
        if self.multiplier is None or self.multiplier.dtype == jnp.int8:
            return self.scale.shape[2]
        return self.multiplier.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, R, K]."""
        return self.bytes.shape[0], self.bytes.shape[1], self.length

    @property
    def stored(self) -> jax.Array:
        """As for `Matrix`."""
        return self.bytes

    @property
    def planes(self) -> int:
        """As for `Matrix`."""
        return planes_in_byte(self.qtype)

    def code_planes(self) -> list[jax.Array]:
        """As for `Matrix`."""
        bits, n = self.qtype.bits, self.planes
        if n == 1:
            return [from_bits(unpack(self.bytes, bits, self.length), self.qtype)]
        mask = jnp.uint8((1 << bits) - 1)
        return [from_bits((self.bytes >> (bits * i)) & mask, self.qtype) for i in range(n)]

    def int8(self) -> list[Matrix]:
        """As for `Matrix`, for integer types; the multipliers of two-level scales are part of the codes."""
        qtype = self.qtype
        if qtype.bits == 8:
            codes, zero_point = shifted_by_128(self.bytes, self.zero_point, self.scale)
            return [Matrix(codes, self.scale, zero_point, SHIFTED, self.offset)]
        planes = [codes.astype(jnp.int8) for codes in self.code_planes()]
        multiplier = self.multiplier
        if multiplier is not None:
            planes = [multiplied(codes, multiplier) for codes in planes]
            qtype = TWO_LEVEL
        return [Matrix(codes, self.scale, self.zero_point, qtype, self.offset) for codes in planes]

    @property
    def scales(self) -> jax.Array:
        """As for `Matrix`."""
        return self.scale if self.multiplier is None else self.scale * self.multiplier.astype(self.scale.dtype)

    def floats(self) -> list[jax.Array]:
        """As for `Matrix`."""
        rest = (self.scales, self.zero_point, self.offset, self.qtype)
        return [_real(codes, *rest, jnp.float32) for codes in self.code_planes()]

    def numbers(self, dtype: DTypeLike) -> tuple[list[jax.Array], jax.Array | None]:
        """As for `Matrix`."""
        if not self.one_scale:
            return [plane.astype(dtype) for plane in self.floats()], None
        if self.qtype.kind == "int":  # multipliers are part of the codes
            return [_shifted(plane.codes, plane.zero_point, plane.qtype, dtype) for plane in self.int8()], self.scale
        return [values_of(codes, self.qtype, dtype) for codes in self.code_planes()], self.scales

    def unpacked(self) -> Matrix:
        """The same matrix with one code per element."""
        if self.qtype.kind == "int":
            planes = self.int8()
            codes = self._interleaved([plane.codes for plane in planes])
            return dataclasses.replace(planes[0], codes=codes)
        codes, rest = self._interleaved(self.code_planes()), (self.zero_point, self.qtype, self.offset)
        return Matrix(codes, self.scales, *rest, power_of_two=self.power_of_two)

    def _interleaved(self, planes: list[jax.Array]) -> jax.Array:
        return planes[0] if len(planes) == 1 else jnp.stack(planes, axis=-1).reshape(self.shape)


def shifted_by_128(codes: jax.Array, zero_point: jax.Array | None, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 codes and their zero point shifted to int8, since XLA's fast path takes only signed codes."""
    zero_point = jnp.full(scale.shape, -128, jnp.int32) if zero_point is None else zero_point - 128
    return (codes ^ jnp.uint8(128)).astype(jnp.int8), zero_point


def planes_in_byte(qtype: QType) -> int:
    """The number of codes in a byte if they are unpacked in planes; else 1."""
    return 8 // qtype.bits if 8 % qtype.bits == 0 else 1


def multiplied(codes: jax.Array, multiplier: jax.Array) -> jax.Array:
    """int8 codes [B, R, K] times the multiplier of their group, in int8."""
    b, r, k = codes.shape
    groups = multiplier.shape[2]
    return (codes.reshape(b, r, groups, k // groups) * multiplier[..., None]).reshape(b, r, k)
