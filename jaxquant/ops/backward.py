"""Gradients of a product: two more products, of the incoming gradient with either operand's values.

For ``y[b, m, n] = sum_k x[b, m, k] w[b, n, k]``:

    dx[b, m, k] = sum_n g[b, m, n] w[b, n, k]        dw[b, n, k] = sum_m g[b, m, n] x[b, m, k]

The sum over m is over an axis that is last on neither side, and XLA's CPU library has no such product. There the left
operand is copied with that axis last, which takes a fraction of the time that it saves. The gradient of a weight has
the layout of the weight: [b, k, n] where the weight is stored so.

Where gradients are quantized, both are products of integers, or of fp8. A scale must be constant along the summed axis.
But w has a scale for each row n, and x one for each row m, which are the axes of the two sums. So these scales are
multiplied into g first; then g is quantized, with one scale for all the terms of a sum.

    dx[b, m, k] = t[b, m] sum_n u[b, m, n] (c[b, n, k] - z[b, n])        t u ~ g s        w = s (c - z)

fp8 numbers are exact in bfloat16: they are multiplied in bfloat16 and summed in float32, as in the forward pass.

Stochastic rounding takes its noise from a key and from a sum of the gradient's bits, so that the layers of a scan,
which share a key, get different noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.affine import as_codes, scaled_codes
from jaxquant.core.by_platform import Target, by_platform
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import flat
from jaxquant.core.sizes import number
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.axes import Axes, split_up
from jaxquant.ops.kernels.cpu.layout import transpose_by_tiles
from jaxquant.ops.kernels.dots import float_dot
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.kernels.tpu.dots import decodes_in_products
from jaxquant.ops.kernels.tpu.layout import rows_last
from jaxquant.ops.quantized_matrix import Matrix

__all__ = ["as_stored", "lhs_gradient", "rhs_gradient"]

Place = Callable[[jax.Array], jax.Array]
"""Gives [B or 1, M or 1, N or 1] the axes of an operand."""


def as_stored(axes: Axes) -> Axes:
    """The axes of a right operand for `lhs_gradient`: rows and contraction swapped if they are stored in that order."""
    return Axes(axes.batch, axes.contract, axes.rows) if _rows_last(axes) else axes


def lhs_gradient(
    g: jax.Array,
    w: jax.Array | Matrix,
    axes: Axes,
    shape: tuple[int, ...],
    rhs: Axes,
    how: QuantSpec | lax.PrecisionLike,
    key: jax.Array | None = None,
) -> jax.Array:
    """The gradient with respect to the left operand.

    Args:
      g: the incoming gradient, [B, M, N].
      w: the right operand by its axes `as_stored`, [B, K, N] or [B, N, K]: its values, or its codes, whose scales
        then go into g.
      axes: of the left operand.
      shape: of the left operand.
      rhs: the axes of the right operand.
      how: what quantizes g, or the precision of the float product.
      key: for stochastic rounding.
    """
    place = functools.partial(_restored, axes=axes, shape=shape)
    turned = _rows_last(rhs)
    along = (2, 2 if turned else 1)
    if isinstance(w, Matrix):
        scale, zero = (w.scale, w.zero_point) if turned else (_turned(w.scale), _turned(w.zero_point))
        if isinstance(how, QuantSpec):
            u, t = _quantized(g, scale, how, 2, key)
            out = _codes_product(u, w, w.codes, along, 0, zero, place)
            return (out * place(t)).astype(g.dtype)
        assert zero is None
        out = by_platform(_ProductOfCodes(along, how), g, w.codes, scale)
    else:
        assert not isinstance(how, QuantSpec)
        out = float_dot(g, w, along, how)
    return place(out)


def rhs_gradient(
    g: jax.Array,
    x: jax.Array | Matrix,
    axes: Axes,
    shape: tuple[int, ...],
    how: QuantSpec | lax.PrecisionLike,
    key: jax.Array | None = None,
) -> jax.Array:
    """The gradient with respect to the right operand, of these axes and that shape; ``x`` is [B, M, K].

    Where ``how`` is a precision, an x of integers is converted to its real values.
    """
    transposed = _rows_last(axes)  # the result is [b, k, n]
    place = functools.partial(_restored, axes=as_stored(axes), shape=shape)
    if isinstance(how, QuantSpec):
        assert isinstance(x, Matrix)
        u, t = _quantized(g, x.scale, how, 1, key)
        if transposed:
            out = _codes_product(u, x, _with_rows_last(x.codes), (2, 1), 1, x.zero_point, place)
        else:
            out = _codes_product(_with_rows_last(u), x, x.codes, (2, 1), 0, _turned(x.zero_point), place)
            t = _turned(t)
        return out * place(t)
    if transposed:
        out = float_dot(_values_with_rows_last(x, g.dtype), g, (2, 1), how)
    else:
        x = x.values(x.scale.dtype).astype(g.dtype) if isinstance(x, Matrix) else x
        out = float_dot(_with_rows_last(g), x, (2, 1), how)
    return place(out)


@dataclasses.dataclass(frozen=True)
class _ProductOfCodes:
    """The float product of g with codes times scales along the summed axis; either factor can be multiplied by these.

    Attributes:
      along: the summed axis of g and of the codes.
      precision: of the product.
    """

    along: tuple[int, int]
    precision: lax.PrecisionLike

    def on(self, target: Target, *operands: PyTree) -> jax.Array:
        """The product: of g with real values that it makes of codes as it reads them, or of g times scales."""
        g, codes, scale = operands
        if decodes_in_products(target, g.shape[1]):
            scale = scale if self.along[0] == self.along[1] else jnp.swapaxes(scale, 1, 2)
            return self._dot(g, codes.astype(scale.dtype) * scale)
        return self._dot((g.astype(scale.dtype) * scale).astype(g.dtype), codes)

    def like(self, *operands: PyTree) -> jax.Array:
        """As for `Ways`."""
        g, codes, _ = operands
        return self._dot(g, codes)

    def stands_for(self, *operands: PyTree) -> None:
        """As for `Ways`: the backward pass keeps nothing."""
        del operands

    def _dot(self, g: jax.Array, values: jax.Array) -> jax.Array:
        return float_dot(g, values.astype(g.dtype), self.along, self.precision)


def _rows_last(axes: Axes) -> bool:
    """Whether the contracted axes precede the rows."""
    return bool(axes.rows) and bool(axes.contract) and axes.contract[0] < axes.rows[0]


def _with_rows_last(x: jax.Array) -> jax.Array:
    """[b, rows, k] as [b, k, rows]; on the CPU the transpose is written to memory, on a TPU that of codes."""

    def in_memory(x: jax.Array) -> jax.Array:
        return lax.optimization_barrier(transpose_by_tiles(x, order=(0, 2, 1)))

    return lax.platform_dependent(x, cpu=in_memory, tpu=rows_last, default=lambda x: jnp.swapaxes(x, 1, 2))


def _values_with_rows_last(x: jax.Array | Matrix, dtype: DTypeLike) -> jax.Array:
    """An operand's values as [b, k, rows]; on the CPU its codes are transposed as bytes."""
    if not isinstance(x, Matrix):
        return _with_rows_last(x)
    codes, (scale, zero) = _with_rows_last(x.codes), (_turned(x.scale), _turned(x.zero_point))
    values = codes.astype(scale.dtype)
    values = ((values if zero is None else values - zero.astype(scale.dtype)) * scale).astype(dtype)
    return lax.platform_dependent(values, cpu=lax.optimization_barrier, default=lambda v: v)


@overload
def _turned(x: jax.Array) -> jax.Array: ...


@overload
def _turned(x: jax.Array | None) -> jax.Array | None: ...


def _turned(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.swapaxes(x, 1, 2)


def _restored(x: jax.Array, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """[B or 1, rows or 1, K or 1] by these axes, in the order of the axes of an operand of that shape."""
    split = split_up(x, [[shape[i] for i in part] for part in (axes.batch, axes.rows, axes.contract)])
    return jnp.transpose(split, [axes.order.index(i) for i in range(len(shape))])


def _dot(left: jax.Array, right: jax.Array, along: tuple[int, int], **how: Any) -> jax.Array:
    return lax.dot_general(left, right, (((along[0],), (along[1],)), ((0,), (0,))), **how)


def _quantized(
    g: jax.Array, scale: jax.Array, spec: QuantSpec, axis: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes of g times the scale of an operand, and their own scale, which is constant along ``axis``."""
    if spec.rounding == "stochastic":
        g = g.astype(scale.dtype) * scale
        if key is None:
            todo = "Pass key=jax.random.key(...) to quantized, or to the op, a new one for each step"
            raise quant_error("grad", "stochastic rounding of gradients needs a key", todo=todo, grad=spec)
        bits = jnp.sum(lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32), dtype=jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(key, axis), bits)
        q = as_codes(g, spec, (axis - g.ndim,), key=key)
    else:
        q = scaled_codes(g, scale, spec=spec, axes=(axis - g.ndim,))
    return q.codes, flat(q.scale)


def _codes_product(
    u: jax.Array, of: Matrix, codes: jax.Array, along: tuple[int, int], own: int, zero: jax.Array | None, place: Place
) -> jax.Array:
    """The product of u, the codes of a gradient, with the codes of an operand, on either side, in float32.

    Args:
      u: codes.
      of: the operand.
      codes: its codes, with the axes in the order that the product wants.
      along: the summed axis of the left and of the right factor.
      own: which factor is u, 0 (left) or 1 (right).
      zero: the operand's zero points, one for each index of that axis of u; or None.
      place: gives sums the axes of the result.
    """
    left, right = (u, codes) if own == 0 else (codes, u)
    if of.qtype.kind == "int":
        return _integer(left, right, along, own, zero, of.reach, place)
    return place(float_dot(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), along))


def _integer(
    left: jax.Array,
    right: jax.Array,
    along: tuple[int, int],
    own: int,
    zero: jax.Array | None,
    reach: int,
    place: Place,
) -> jax.Array:
    """``sum u (c - z)``, exact in int32, as float32; sums of symbolic length, which could overflow, are all in float32.

    Args:
      left, right: u and c, or c and u.
      along: the summed axis of each.
      own: which of them is u, 0 or 1.
      zero: z, one for each index of that axis of u; or None.
      reach: the largest magnitude of c - z.
      place: gives sums the axes of the result; on a TPU before they are scaled, as in `Product.split`.
    """
    operands, length, sums = (left, right), left.shape[along[0]], []
    if number(length) == math.inf:
        u, c = (operands[i].astype(jnp.float32) for i in (own, 1 - own))
        out = _dot(*((u, c) if own == 0 else (c, u)), along)
        return place(out if zero is None else out - jnp.sum(u * zero.astype(u.dtype), axis=along[own], keepdims=True))
    limit = overflow_limit(127, reach)
    for start in range(0, length, limit):
        stop = min(start + limit, length)
        u, c = (lax.slice_in_dim(operands[i], start, stop, axis=along[i]) for i in (own, 1 - own))
        out = _dot(*((u, c) if own == 0 else (c, u)), along, preferred_element_type=jnp.int32)
        if zero is not None:
            z = lax.slice_in_dim(zero, start, stop, axis=along[own])
            out = out - jnp.sum(u * z, axis=along[own], keepdims=True, dtype=jnp.int32)
        sums.append(place(out).astype(jnp.float32))
    return functools.reduce(jnp.add, sums)
