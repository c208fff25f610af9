"""Codes of large arrays, in the form that XLA's CPU backend writes fast."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import Encoded, codes_apart, codes_in_parts, encode, minor_axes
from jaxquant.core.codec import codes_of, to_bits
from jaxquant.core.layout import stored_order
from jaxquant.core.packing import pack
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.sizes import number
from jaxquant.core.specs import QuantSpec
from jaxquant.ops.kernels.cpu.layout import LARGE, transpose_by_tiles

__all__ = ["codes_of_parts", "rounded_in_branch"]


@codes_apart.on("cpu", when=lambda x, *_, **__: number(x.size) >= LARGE)
def rounded_in_branch(
    x: jax.Array, found: Encoded, key: jax.Array | None, *, spec: QuantSpec, axes: tuple[int, ...]
) -> jax.Array:
    """The codes of an array, rounded in a branch.

    XLA's CPU backend fuses rounding into the operations that follow: a transpose of the codes, which then reads floats
    column by column; packing; the backward pass, which rounds again. It does not fuse across a branch.
    """

    def rounded(x: jax.Array) -> jax.Array:
        return codes_of(encode(x, spec, axes, found.scale, found.zero_point, key).values, spec.type)

    return lax.cond(jnp.isnan(jnp.max(scale_values(found.scale))), rounded, rounded, x)


def _fits(q: QTensor, x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> bool:
    """Whether the array has an axis that can be split, and splitting is faster.

    It is slower for transposed bytes that are packed already, and for fp8 codes.
    """
    minor = minor_axes(axes, x.ndim)
    fast = spec.type.packed if minor == () else spec.type.kind == "int" and not spec.type.packed
    return fast and _cut_axis(x, axes, stored_order(x.ndim, minor)[-1:]) is not None


_PARTS, _RUN, _RUNS = 16, 16, 8
_SEVERAL = 1 << 22  # elements; the codes of smaller arrays are written at once


def _cut_axis(x: jax.Array, axes: tuple[int, ...], last: tuple[int, ...]) -> int | None:
    """The axis by which the codes of a large array are written in parts; it shares no scale and is not stored last.

    Parts have a multiple of 8 runs, so that arrays sharded over 8 devices (or a divisor) can be split. Arrays are not
    split if shardings are part of their types, as on explicit meshes, or if a size is symbolic.
    """
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    if not _SEVERAL <= number(x.size) < math.inf or any(axis is not None for axis in spec):
        return None
    kept = [i for i in range(x.ndim) if i - x.ndim not in axes and i not in last]
    kept = [i for i in kept if x.shape[i] % (_PARTS * _RUN * _RUNS) == 0]
    return max(kept, key=lambda i: x.shape[i], default=None)


@codes_in_parts.on("cpu", when=_fits)
def codes_of_parts(q: QTensor, x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """The codes of `quantize`, rounded for a sixteenth of the array at a time, and then transposed or packed.

    A part is every sixteenth run of 16 along an axis, [runs, 16, 16]. An array sharded by whole runs keeps its
    elements on their devices.
    """
    scale, zero_point, minor = scale_values(q.scale), q.zero_point, minor_axes(axes, x.ndim)
    axis = _cut_axis(x, axes, stored_order(x.ndim, minor)[-1:])
    assert axis is not None
    ndim, nan = x.ndim, jnp.isnan(jnp.max(scale))
    # The same axes, counted from the end, with one more axis after the split axis.
    inner_axes, inner_minor = (tuple(i - 1 if i + ndim < axis else i for i in old) for old in (axes, minor))

    def runs(v: jax.Array, i: jax.Array) -> jax.Array:
        if v.shape[axis] == 1:
            return jnp.expand_dims(v, axis)
        v = v.reshape(*v.shape[:axis], -1, _PARTS, _RUN, *v.shape[axis + 1 :])
        return lax.dynamic_index_in_dim(v, i, axis + 1, keepdims=False)

    def apart(compute: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, i: lax.cond(nan, compute, compute, x, i)

    @apart
    def rounded(x: jax.Array, i: jax.Array) -> jax.Array:
        zero = None if zero_point is None else runs(zero_point, i)
        found = encode(runs(x, i), spec, inner_axes, runs(scale, i), zero)
        codes = codes_of(found.values, spec.type)
        return to_bits(codes, QTYPES[spec.qtype]) if minor == () else lax.bitcast_convert_type(codes, jnp.int8)

    @apart
    def stored(x: jax.Array, i: jax.Array) -> jax.Array:
        codes = rounded(x, i)
        return transpose_by_tiles(codes, order=order) if minor else pack(codes, spec.type.bits)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        part = lax.bitcast_convert_type(stored(x, i), out.dtype)  # uint8 would be transposed one by one
        return lax.dynamic_update_index_in_dim(out, part, i, place)

    order = stored_order(ndim + 1, inner_minor)
    shape, place = jax.eval_shape(stored, x, 0).shape, order.index(axis) + 1
    dtype = jnp.uint8 if spec.type.packed else spec.type.code_dtype
    zeros = jnp.broadcast_to(nan.astype(dtype), (*shape[:place], _PARTS, *shape[place:]))  # vary over devices as x does
    out = lax.fori_loop(0, _PARTS, step, zeros)
    return out.reshape(*shape[: place - 1], x.shape[axis], *shape[place + 1 :])
