"""Shapes of the result of `quantize`, without a trace: plans count bytes and choose kernels by them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core.affine import minor_axes
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.layout import stored_order
from jaxquant.core.packing import packed_length
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.specs import QuantSpec

__all__ = ["abstract"]


def abstract(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    spec: QuantSpec,
    axes: tuple[int, ...],
    *,
    minor: tuple[int, ...] | None = None,
    stored: bool = True,
) -> QTensor:
    """`quantize` of an array of this shape, as a QTensor of `jax.ShapeDtypeStruct`.

    Args:
      shape: the array's.
      dtype: the array's.
      spec: how it is quantized.
      axes: the reduced axes, sorted, counted from the end.
      minor: the axes that are stored last; None: the axes that `quantize` stores last.
      stored: False: with one code per element, in the order of the array, as within a product.

    Example:
      >>> import jaxquant as jq
      >>> from jaxquant.core.abstract import abstract
      >>> abstract((64, 32), "float32", jq.QuantSpec("int4"), (-2,)).nbytes
      1152
    """
    blocks = scale_shape(shape, block_shape(shape, spec.granularity, axes))
    zero_point = None if spec.symmetric else jax.ShapeDtypeStruct(blocks, spec.type.code_dtype)
    parts: dict[str, Any] = {
        "scale": _scale(blocks, spec, axes),
        "zero_point": zero_point,
        "qtype": spec.qtype,
        "dtype": dtype,
    }
    if not stored:
        return QTensor(jax.ShapeDtypeStruct(shape, spec.type.code_dtype), **parts)
    return _packed(shape, minor_axes(axes, len(shape)) if minor is None else minor, **parts)


def _packed(shape: tuple[int, ...], minor: tuple[int, ...], **parts: Any) -> QTensor:
    """With codes as `jaxquant.core.qtensor.from_codes` stores them."""
    info = QTYPES[parts["qtype"]]
    codes = [shape[i] for i in stored_order(len(shape), minor)]
    length, kind = None, info.code_dtype
    if info.packed:
        length, kind = codes[-1], jnp.uint8
        codes[-1] = packed_length(length, info.bits)
    return QTensor(jax.ShapeDtypeStruct(tuple(codes), kind), minor=minor, length=length, **parts)


def _scale(blocks: tuple[int, ...], spec: QuantSpec, axes: tuple[int, ...]) -> QTensor | jax.ShapeDtypeStruct:
    ndim = len(blocks)
    if spec.two_level:
        unit = tuple(1 if i - ndim in axes else n for i, n in enumerate(blocks))
        one = jax.ShapeDtypeStruct(unit, jnp.float32)
        return _packed(blocks, (), scale=one, zero_point=None, qtype="uint4", dtype=jnp.float32)
    if spec.type.scale_format == "e4m3":
        one = jax.ShapeDtypeStruct((1,) * ndim, jnp.float32)
        return _packed(blocks, (), scale=one, zero_point=None, qtype="float8_e4m3fn", dtype=jnp.float32)
    kind = jnp.float8_e8m0fnu if spec.type.scale_format == "e8m0" else jnp.dtype(spec.scale_dtype or jnp.float32)
    return jax.ShapeDtypeStruct(blocks, kind)
