"""A float operand as int8 digits, so that a product with a quantized weight is an int8 dot.

    x = s (d0 + d1 / 254 + d2 / 254**2 + ...)        digits d in -127 .. 127, one s per row

Each digit of x is a further row of the *same* int8 dot, and the int32 results are weighted and summed afterwards. Where
reading the weight is what takes the time, at few rows, the second digit is free. The relative error against the float
product is about 4e-5 with two digits, and below float32's own with three.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import divide
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.integer import integer
from jaxquant.ops.matrix import Matrix

__all__ = ["digit_count", "digit_matrix", "digits", "digits_of", "is_highest", "sum_of_parts"]


def is_highest(precision: lax.PrecisionLike) -> bool:
    """Whether a product is to be as exact as float32 is; None stands for JAX's default."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    highest = {lax.Precision.HIGHEST, "highest", "float32"}
    return any(p in highest for p in (precision if isinstance(precision, tuple) else (precision,)))


def digit_count(precision: lax.PrecisionLike) -> int:
    """Digits for a precision: 2 (relative error about 4e-5), or 3 at HIGHEST (below float32's own)."""
    return 3 if is_highest(precision) else 2


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


def digits(x: Matrix, w: Matrix, count: int) -> jax.Array:
    """``[B, count * M, K]``, a `digit_matrix`, times ``[B, N, K]``: the float product ``[B, M, N]``."""
    return integer(x, w, lambda out: sum_of_parts(out, count, 1))
