"""Quantized operands in one shape: ``[batch, rows, K]``, contraction-minor.

A contraction is brought to this form, multiplied by a kernel (`jaxquant.ops.select`) and brought back. A `Matrix` has
one code per element; a `Packed` keeps the stored bytes of a narrow weight. Both are pytrees, so that `form` can
describe an operand from shapes alone, and a kernel can be chosen without arrays.

"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.codec import from_bits, values_of
from jaxquant.core.packing import unpack
from jaxquant.core.qtensor import Operand, QTensor, Scale, flat, scale_values
from jaxquant.core.qtypes import QType
from jaxquant.core.sizes import number
from jaxquant.core.types import TreeDef
from jaxquant.ops.trained import TrainedTensor

__all__ = [
    "Axes",
    "Form",
    "Matrix",
    "Packed",
    "canonical",
    "form",
    "matrix",
    "packed",
    "pytree",
    "split_up",
]

Class = TypeVar("Class", bound=type)

_SHIFTED = QType("uint8 - 128", "int", 8, -128, 127)
_TWO_LEVEL = QType("code * multiplier", "int", 8, -128, 127)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one operand of a contraction, in the order of the canonical form."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    contract: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, batch: tuple[int, ...], contract: tuple[int, ...]) -> Axes:
        """Axes of an operand of rank ``ndim``; axes that are neither batch nor contracted are rows."""
        return cls(batch, tuple(i for i in range(ndim) if i not in batch and i not in contract), contract)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes in canonical order: batch, rows, contracted."""
        return self.batch + self.rows + self.contract

    def flatten(self, x: jax.Array) -> jax.Array:
        """``[batch, rows, K]``."""
        return jnp.transpose(x, self.order).reshape(self._sizes(x))

    def flatten_scale(self, x: jax.Array) -> jax.Array:
        """``[batch, rows, K]`` of scales, which unlike codes are stored in logical order.

        Where possible it reshapes first: codes are a transpose of the stored array, and XLA cancels two transposes that
        have no reshape between them.
        """
        parts = (self.batch, self.rows, self.contract)
        order = sorted(range(3), key=lambda i: parts[i][:1])
        if tuple(i for part in order for i in parts[part]) != tuple(range(x.ndim)):
            return self.flatten(x)
        sizes = self._sizes(x)
        return jnp.transpose(x.reshape([sizes[i] for i in order]), [order.index(i) for i in range(3)])

    def _sizes(self, x: jax.Array) -> list[int]:
        return [math.prod(x.shape[i] for i in part) for part in (self.batch, self.rows, self.contract)]


def split_up(result: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A product's result in another shape.

    Where rows become several axes, the TPU's compiler scales the result in that shape, and so not within the product:
    914 thousand cycles for [2, 2048, 4096] times [4096, 4096] in W8A8 on a v5e. Where rows are kept, they are 541.
    """
    before, after = ([n for n in s if number(n) != 1] for s in (result.shape, shape))
    if before != after:
        result = lax.platform_dependent(result, tpu=lax.optimization_barrier, default=lambda x: x)
    return result.reshape(shape)


def pytree(*static: str) -> Callable[[Class], Class]:
    """A class decorator that registers a frozen dataclass as a pytree; the ``static`` fields are not arrays."""

    def register(cls: Class) -> Class:
        arrays = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, arrays, list(static))

    return register


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
        return _planes(self.qtype)

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
            codes, zero_point = _shifted_by_128(self.bytes, self.zero_point, self.scale)
            return [Matrix(codes, self.scale, zero_point, _SHIFTED, self.offset)]
        planes = [codes.astype(jnp.int8) for codes in self.code_planes()]
        multiplier = self.multiplier
        if multiplier is not None:
            planes = [_multiplied(codes, multiplier) for codes in planes]
            qtype = _TWO_LEVEL
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


def _shifted_by_128(codes: jax.Array, zero_point: jax.Array | None, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 codes and their zero point shifted to int8, since XLA's fast path takes only signed codes."""
    zero_point = jnp.full(scale.shape, -128, jnp.int32) if zero_point is None else zero_point - 128
    return (codes ^ jnp.uint8(128)).astype(jnp.int8), zero_point


def _planes(qtype: QType) -> int:
    return 8 // qtype.bits if 8 % qtype.bits == 0 else 1


def _multiplied(codes: jax.Array, multiplier: jax.Array) -> jax.Array:
    """int8 codes [B, R, K] times the multiplier of their group, in int8."""
    b, r, k = codes.shape
    groups = multiplier.shape[2]
    return (codes.reshape(b, r, groups, k // groups) * multiplier[..., None]).reshape(b, r, k)


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
    if scale is None or any(length // groups % _planes(x.type) for groups in cuts):
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
        return Matrix(_multiplied(codes.astype(jnp.int8), multiplier), scale, None, _TWO_LEVEL, rows_last=rows_last)
    if qtype.kind == "int":
        if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer):
            zero_point = zero_point.astype(jnp.int32)
        if codes.dtype == jnp.uint8 and qtype.bits == 8:  # u8 operands fall off the fast path: shift to s8
            codes, zero_point = _shifted_by_128(codes, zero_point, scale)
            qtype = _SHIFTED
        else:
            codes = codes.astype(jnp.int8)
    return Matrix(codes, scale, zero_point, qtype, offset, rows_last, power_of_two)


def canonical(x: Operand, axes: Axes) -> Matrix | Packed | jax.Array | None:
    """An operand in canonical form: `Packed` if its codes are packed, a float array flattened; None as for `matrix`."""
    return packed(x, axes) or matrix(x, axes) if isinstance(x, QTensor) else axes.flatten(x)


Form = Matrix | Packed | jax.ShapeDtypeStruct | None
"""The result of `canonical` with shapes and dtypes in place of arrays; `jax.ShapeDtypeStruct` is a float array."""


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
