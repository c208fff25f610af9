"""How a product of canonical matrices is computed: the one place where that is chosen.

A formulation takes two operands in canonical form, ``[B, M, K]`` and ``[B, N, K]``, each a quantized `Matrix` or a
float array, and returns the product ``[B, M, N]``, in float32 unless an operand is float64.

| operands | formulation |
|---|---|
| integer, integer | `integer`: int8 dots accumulated in int32, one per group of K, zero points corrected exactly |
| integer, float | `digits` on CPU: the float side as int8 digits, stacked as rows of one int8 dot |
| integer, float64; integer, float off the CPU | `dequantized` |
| fp8 or fp4, the same, one scale per row | `minifloat`: a bfloat16 dot, exact products, float32 accumulation |
| groups of fewer than 8, and anything else | `dequantized`: a float dot of the dequantized operands |
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import divide
from jaxquant.core.codec import values_of
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.matrix import Matrix

__all__ = ["choose", "digit_count", "digit_matrix", "digits_of", "on_cpu", "overflow_limit", "product", "sum_of_parts"]

_INT32_MAX = 2**31 - 1
_FEW_ROWS = 32
_SHORTEST_GROUP = 8  # a loop of shorter int8 dots costs more than a float dot


def choose(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array) -> str:
    """The name of the formulation for two operands (``"digits"`` stands for ``"dequantized"`` off the CPU)."""
    quantized = [x for x in (lhs, rhs) if isinstance(x, Matrix)]
    if quantized and _common_group(*quantized) < min(_SHORTEST_GROUP, quantized[0].codes.shape[2]):
        return "dequantized"
    if len(quantized) == 2 and all(x.integer for x in quantized):
        return "integer"
    if len(quantized) == 2 and all(x.minifloat for x in quantized):
        return "minifloat"
    if len(quantized) == 1 and quantized[0].integer:
        wide = any(not isinstance(x, Matrix) and x.dtype == jnp.float64 for x in (lhs, rhs))
        return "dequantized" if wide else "digits"
    return "dequantized"


def on_cpu(cpu: Any, default: Any) -> jax.Array:
    """One of two computations, by the platform that the program is lowered for."""
    return lax.platform_dependent(cpu=cpu, default=default)


def product(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[B, M, K] x [B, N, K] -> [B, M, N]."""
    name = choose(lhs, rhs)
    if isinstance(lhs, Matrix) and isinstance(rhs, Matrix):
        if name == "integer":
            return _integer(lhs, rhs)
        if name == "minifloat":
            return _minifloat(lhs, rhs)
    dequantized = functools.partial(_dequantized, lhs, rhs, precision)
    if name == "digits":
        # Off the CPU, XLA fuses the conversion into the dot, and float units are wide.
        return on_cpu(functools.partial(_digits, lhs, rhs, precision), dequantized)
    return dequantized()


# -- int8 dots --------------------------------------------------------------------------------------------------------


def _dot(lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:
    return lax.dot_general(lhs, rhs, (((2,), (2,)), ((0,), (0,))), **kwargs)


def _accumulate(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """int8 [B, M, K] x [B, N, K] -> int32 [B, M, N], on the path that XLA's CPU library serves.

    One row is off that path, so it is padded to two. The operand with many rows (the weight, at inference) goes left
    when the other has few; the barrier keeps XLA from turning transpose(dot(w, x)) back into dot(x, w), which is
    slower.
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
    if rz is not None:
        rz = jnp.swapaxes(rz, 1, 2)
        out = out - rz * jnp.sum(lhs, axis=2, dtype=jnp.int32)[:, :, None]
    if lz is not None:
        out = out - lz * jnp.sum(rhs, axis=2, dtype=jnp.int32)[:, None, :]
    if lz is not None and rz is not None:
        out = out + lz * rz * jnp.int32(lhs.shape[2])
    return out


def overflow_limit(lhs_reach: int, rhs_reach: int) -> int:
    """The largest number of products of such magnitudes whose sum is sure to fit an int32."""
    return max(_INT32_MAX // (lhs_reach * rhs_reach), 1)


def _common_group(*operands: Matrix) -> int:
    """The longest run of K within which no operand changes its scale."""
    return math.gcd(*(x.codes.shape[2] // x.groups for x in operands))


def _integer(lhs: Matrix, rhs: Matrix, combine: Callable[[jax.Array], jax.Array] = lambda out: out) -> jax.Array:
    """Integer dots, each exact in int32, scaled, combined and summed in float32.

    The contraction is cut where a scale or a zero point changes, and where a longer sum could overflow. ``combine`` is
    linear and may make the result smaller, which is best done before it is written to memory.
    """
    k, group = lhs.codes.shape[2], _common_group(lhs, rhs)
    limit = overflow_limit(lhs.reach, rhs.reach)

    def part(start: Any, size: int) -> jax.Array:
        """Scaled product of ``size`` codes from ``start``, all in one group of either side."""

        def at(x: Matrix, value: jax.Array) -> jax.Array:
            if x.groups == 1:
                return value
            return lax.dynamic_slice_in_dim(value, start // (k // x.groups), 1, axis=2)

        codes = [x.codes if size == k else lax.dynamic_slice_in_dim(x.codes, start, size, axis=2) for x in (lhs, rhs)]
        zeros = [None if x.zero_point is None else at(x, x.zero_point) for x in (lhs, rhs)]
        out = _corrected(*codes, *zeros).astype(jnp.float32)
        return combine(out * at(lhs, lhs.scale) * jnp.swapaxes(at(rhs, rhs.scale), 1, 2))

    if group > limit:  # few, long cuts of unequal length
        cuts = [part(c + s, min(limit, group - s)) for c in range(0, k, group) for s in range(0, group, limit)]
        return functools.reduce(jnp.add, cuts)
    if group == k:
        return part(0, k)
    dtype = jnp.promote_types(lhs.scale.dtype, rhs.scale.dtype)
    # Zeros that vary over devices as the codes do; zeros_like are such in newer JAX only.
    left, right = ((x.codes[:, :, :1] * 0).astype(dtype) for x in (lhs, rhs))
    start = combine(left + jnp.swapaxes(right, 1, 2))
    return lax.fori_loop(0, k // group, lambda i, total: total + part(i * group, group), start)


# -- a float operand as int8 digits -----------------------------------------------------------------------------------


def digit_count(precision: lax.PrecisionLike) -> int:
    """Digits for a precision: 2 (relative error about 4e-5), or 3 at HIGHEST (below float32's own)."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    highest = {lax.Precision.HIGHEST, "highest", "float32"}
    return 3 if any(p in highest for p in (precision if isinstance(precision, tuple) else (precision,))) else 2


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


def digit_matrix(x: jax.Array, precision: lax.PrecisionLike) -> Matrix:
    """A float [B, M, K] as int8 [B, digits * M, K]: the rows of the first digit, then those of the second, ..."""
    count = digit_count(precision)
    digits, scale = digits_of(x, count, 2)
    weights = jnp.concatenate([scale * (1 / 254) ** i for i in range(count)], axis=1)
    return Matrix(jnp.concatenate(digits, axis=1), weights, None, _DIGIT)


def sum_of_parts(x: jax.Array, count: int, axis: int) -> jax.Array:
    """x cut into ``count`` along an axis, and added up: XLA fuses this where it would not fuse a reduction."""
    return functools.reduce(jnp.add, jnp.split(x, count, axis))


def _digits(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """One int8 dot for all digits: they are extra rows of the float operand, weighted and summed afterwards."""
    count = digit_count(precision)
    if isinstance(lhs, Matrix):
        assert not isinstance(rhs, Matrix)
        return _integer(lhs, digit_matrix(rhs, precision), lambda out: sum_of_parts(out, count, 2))
    assert isinstance(rhs, Matrix)
    return _integer(digit_matrix(lhs, precision), rhs, lambda out: sum_of_parts(out, count, 1))


# -- float dots -------------------------------------------------------------------------------------------------------


def _minifloat(lhs: Matrix, rhs: Matrix) -> jax.Array:
    """fp8 and fp4 values are exact in bfloat16 and so are their products in float32."""
    out = _dot(
        values_of(lhs.codes, lhs.qtype, jnp.bfloat16),
        values_of(rhs.codes, rhs.qtype, jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return out * lhs.scale * jnp.swapaxes(rhs.scale, 1, 2)


def _dequantized(lhs: Matrix | jax.Array, rhs: Matrix | jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    wide = any((x.scale if isinstance(x, Matrix) else x).dtype == jnp.float64 for x in (lhs, rhs))
    dtype = jnp.float64 if wide else jnp.float32
    values = [x.values(dtype) if isinstance(x, Matrix) else x.astype(dtype) for x in (lhs, rhs)]
    return _dot(*values, precision=precision, preferred_element_type=dtype)
