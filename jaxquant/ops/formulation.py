"""How a product of canonical matrices is computed: the one place where that is chosen.

A formulation takes two operands in canonical form, ``[B, M, K]`` and ``[B, N, K]``, each a quantized `Matrix` or a float
array, and returns the float32 product ``[B, M, N]``.

| operands | formulation |
|---|---|
| integer, integer | `integer`: int8 dots accumulated in int32, one per group of K, zero points corrected exactly |
| integer, float | `digits` on CPU: the float side as int8 digits, stacked as rows of one int8 dot; `dequantized` elsewhere |
| fp8 or fp4, the same, one scale per row | `minifloat`: a bfloat16 dot, exact products, float32 accumulation |
| anything else | `dequantized`: a float dot of the dequantized operands |
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import divide
from jaxquant.core.codec import values_of
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.matrix import Matrix

__all__ = ["choose", "digit_count", "digits_of", "overflow_limit", "product"]

_INT32_MAX = 2**31 - 1
_FEW_ROWS = 32


def choose(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array) -> str:
    """The name of the formulation for two operands (``"digits"`` stands for ``"dequantized"`` off the CPU)."""
    pair = (lhs, rhs)
    quantized = [x for x in pair if isinstance(x, Matrix)]
    if len(quantized) == 2 and all(x.integer for x in quantized):
        return "integer"
    if len(quantized) == 2 and all(x.qtype.kind == "float" and x.groups == 1 for x in quantized):
        return "minifloat"
    if len(quantized) == 1 and quantized[0].integer:
        other = rhs if quantized[0] is lhs else lhs
        return "digits" if other.dtype != jnp.float64 else "dequantized"
    return "dequantized"


def product(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[B, M, K] x [B, N, K] -> [B, M, N]."""
    name = choose(lhs, rhs)
    if name == "digits":
        # Off the CPU, XLA fuses the conversion into the dot, and float units are wide.
        return lax.platform_dependent(
            cpu=functools.partial(_digits, lhs, rhs, precision),
            default=functools.partial(_dequantized, lhs, rhs, precision),
        )
    if name == "integer":
        return _integer(lhs, rhs)
    if name == "minifloat":
        return _minifloat(lhs, rhs)
    return _dequantized(lhs, rhs, precision)


# -- int8 dots ----------------------------------------------------------------------------------------------------------


def _dot(lhs: jax.Array, rhs: jax.Array, **kwargs) -> jax.Array:
    return lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), **kwargs)


def _accumulate(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """int8 [B, M, K] x [B, N, K] -> int32 [B, M, N], on the path that XLA's CPU library serves.

    One row is off that path, so it is padded to two. The operand with many rows (the weight, at inference) goes left when
    the other has few; the barrier keeps XLA from turning transpose(dot(w, x)) back into dot(x, w), which is slower.
    """
    rows, columns = lhs.shape[1], rhs.shape[1]
    dot = functools.partial(_dot, preferred_element_type=jnp.int32)
    if rows == 1:
        lhs = jnp.pad(lhs, ((0, 0), (0, 1), (0, 0)))
    if columns == 1:
        rhs = jnp.pad(rhs, ((0, 0), (0, 1), (0, 0)))
    if rows <= _FEW_ROWS and rows <= columns:
        out = jnp.swapaxes(lax.optimization_barrier(dot(rhs, lhs)), 1, 2)
    else:
        out = dot(lhs, rhs)
    return out[:, :rows, :columns]


def _corrected(lhs: jax.Array, rhs: jax.Array, lz: jax.Array | None, rz: jax.Array | None) -> jax.Array:
    """sum_k (lhs - lz)(rhs - rz) in int32: exact whenever the result fits, since wrap-around cancels."""
    out = _accumulate(lhs, rhs)
    lsum = jnp.sum(lhs, axis=2, dtype=jnp.int32)[:, :, None] if rz is not None else None
    rsum = jnp.sum(rhs, axis=2, dtype=jnp.int32)[:, None, :] if lz is not None else None
    if rz is not None:
        rz = jnp.swapaxes(rz, 1, 2)
        out = out - rz * lsum
    if lz is not None:
        out = out - lz * rsum
    if lz is not None and rz is not None:
        out = out + lz * rz * jnp.int32(lhs.shape[2])
    return out


def overflow_limit(lhs_reach: int, rhs_reach: int) -> int:
    """The largest number of products of such magnitudes whose sum is sure to fit an int32."""
    return max(_INT32_MAX // (lhs_reach * rhs_reach), 1)


def _integer(lhs: Matrix, rhs: Matrix) -> jax.Array:
    """Integer dots, each exact in int32, scaled and summed in float32.

    The contraction is cut where a scale or a zero point changes, and where a longer sum could overflow.
    """
    k = lhs.codes.shape[2]
    group = math.gcd(k // lhs.groups, k // rhs.groups)
    limit = overflow_limit(lhs.reach, rhs.reach)

    def part(start: int | jax.Array, size: int) -> jax.Array:
        """Scaled product of ``size`` codes from ``start``, all in one group of either side."""

        def at(x: Matrix, value: jax.Array | None) -> jax.Array | None:
            if value is None or x.groups == 1:
                return value
            return lax.dynamic_slice_in_dim(value, start * x.groups // k, 1, axis=2)

        codes = [x.codes if size == k else lax.dynamic_slice_in_dim(x.codes, start, size, axis=2) for x in (lhs, rhs)]
        out = _corrected(*codes, at(lhs, lhs.zero_point), at(rhs, rhs.zero_point)).astype(jnp.float32)
        return out * at(lhs, lhs.scale) * jnp.swapaxes(at(rhs, rhs.scale), 1, 2)

    if group > limit:  # few, long cuts of unequal length
        cuts = range(0, k, group)
        return sum(part(c + s, min(limit, group - s)) for c in cuts for s in range(0, group, limit))
    if group == k:
        return part(0, k)
    start = jnp.zeros((lhs.codes.shape[0], lhs.codes.shape[1], rhs.codes.shape[1]), jnp.float32)
    return lax.fori_loop(0, k // group, lambda i, total: total + part(i * group, group), start)


# -- a float operand as int8 digits -----------------------------------------------------------------------------------------


def digit_count(precision: lax.PrecisionLike) -> int:
    """Digits for a precision: 2 (relative error about 4e-5), or 3 at HIGHEST (below float32's own)."""
    pair = precision if isinstance(precision, tuple | list) else (precision,)
    highest = {lax.Precision.HIGHEST, "highest", "float32"}
    return 3 if any(p in highest for p in pair) else 2


def digits_of(x: jax.Array, count: int, axes: int | tuple[int, ...]) -> tuple[list[jax.Array], jax.Array]:
    """``x = scale * (d0 + d1 / 254 + d2 / 254**2 + ...)`` with int8 digits.

    Args:
      x: float array.
      count: number of digits.
      axes: axes that share a scale.

    Returns:
      The digits, and the scale with those axes of size 1. The error is at most ``scale / 2 / 254**(count - 1)``.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(absmax == 0, 1.0, jnp.maximum(divide(absmax, 127.0), jnp.finfo(jnp.float32).tiny))
    rest, digits = divide(x, scale), []
    for _ in range(count):
        digit = jnp.clip(jnp.rint(rest), -127, 127)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * 254
    return digits, scale


_DIGIT = dataclasses.replace(QTYPES["int8"], name="digit", qmin=-127)


def _digits(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """One int8 dot for all digits: they are extra rows of the float operand, weighted and summed afterwards."""
    count = digit_count(precision)

    def sliced(x: jax.Array) -> Matrix:
        digits, scale = digits_of(x, count, 2)
        weights = jnp.concatenate([scale * (1 / 254) ** i for i in range(count)], axis=1)
        return Matrix(jnp.concatenate(digits, axis=1), weights, None, _DIGIT)

    if isinstance(rhs, Matrix):
        out = _integer(sliced(lhs), rhs)
        return jnp.sum(out.reshape(out.shape[0], count, lhs.shape[1], out.shape[2]), axis=1)
    out = _integer(lhs, sliced(rhs))
    return jnp.sum(out.reshape(*out.shape[:2], count, rhs.shape[1]), axis=2)


# -- float dots ---------------------------------------------------------------------------------------------------------


def _minifloat(lhs: Matrix, rhs: Matrix) -> jax.Array:
    """fp8 and fp4 values are exact in bfloat16 and so are their products in float32."""
    out = _dot(
        values_of(lhs.codes, lhs.qtype, jnp.bfloat16),
        values_of(rhs.codes, rhs.qtype, jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return out * lhs.scale * jnp.swapaxes(rhs.scale, 1, 2)


def _dequantized(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    dtype = (
        jnp.float64 if any(not isinstance(x, Matrix) and x.dtype == jnp.float64 for x in (lhs, rhs)) else jnp.float32
    )
    lhs, rhs = (x.values(dtype) if isinstance(x, Matrix) else x.astype(dtype) for x in (lhs, rhs))
    return _dot(lhs, rhs, precision=precision, preferred_element_type=dtype)
