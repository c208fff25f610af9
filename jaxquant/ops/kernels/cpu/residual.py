"""The residual split: a float activation as int8 digits, so that a product with a quantized weight is an int8 dot.

    x = s (d0 + d1 / 254 + d2 / 254**2 + ...)        digits d in -127 .. 127, one s per row

Each digit rounds the remainder of the ones before it. All digits are further rows of the *same* int8 dot, and the int32
results are weighted and summed afterwards. At few rows, where reading the weight takes the time, the second digit is
free. The relative error against the float product is about 4e-5 with two digits, and below float32's own with three.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import divide
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.cpu.int8 import int8_blocks
from jaxquant.ops.kernels.precision import is_highest
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = [
    "ResidualSplit",
    "ScaledResidualSplit",
    "digit_count",
    "digit_matrix",
    "most_rows",
]

_ROWS: dict[machine.Int8Dots, float] = {"tiles": float("inf"), "vectors": 48, "none": 0}
_ROWS_BESIDE_BFLOAT16 = 24

_SCALED = lax.Precision.HIGHEST  # three digits


def most_rows(int8: machine.Int8Dots, *, exact: bool, whole: bool = False) -> float:
    """Most rows of an int8 dot, digits times M, up to which the split is faster than `Blocked` on such a machine.

    Tiles are faster at any number. With vectors an int8 dot is about 1.7 times as fast as a float32 dot once arithmetic
    is the bound, and two digits use this up (benchmarks/matmul.py). A ``whole`` weight is one dot in digits, which
    cores share better than a loop over blocks, so it may have twice as many rows.


    An activation that is ``exact`` in bfloat16 needs no digits: products with codes are exact in blocks, and as fast on
    machines that multiply bfloat16, with tiles or without. So it has digits only at few rows, where reading the weight
    is the bound. The limit is the same on every machine, so that all are equally accurate at many rows.
    """
    if exact:
        return min(_ROWS[int8], _ROWS_BESIDE_BFLOAT16)
    return _ROWS[int8] * (2 if whole and machine.cores() > 1 else 1)


@dataclasses.dataclass(frozen=True)
class ResidualSplit(Kernel[Product]):
    """The split of a float activation beside integers with one scale per row, or two-level scales.

    Attributes:
      digits: how many.
    """

    platforms = ("cpu",)

    digits: int
    title = "int8 residual split"
    exact = True

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: up to `most_rows`."""
        most, count = _most_rows(problem), digit_count(problem.precision)
        fits = count * problem.rows <= most and problem.quantized[0].groups == 1
        return cls(count) if fits else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.canonical()
        x = x.astype(jnp.float32)
        return problem.restored(int8_blocks(digit_matrix(x, self.digits), w, self.digits))


@dataclasses.dataclass(frozen=True)
class ScaledResidualSplit(Kernel[Product]):
    """The split of an activation that is multiplied by scales which all rows of the weight share.

        sum_k x[m, k] (s[k] (c[n, k] - z[k]))  =  sum_k (x[m, k] s[k]) (c[n, k] - z[k])

    A cache of values with a scale per token is such a weight. Rows of x s have a wider range than rows of x, for which
    two digits suffice, so a third digit is added; it is free at one row.
    """

    platforms = ("cpu",)

    title = "int8 residual split"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: up to `most_rows`, of a weight with a byte per code."""
        most = _most_rows(problem)
        if not digit_count(_SCALED) * problem.rows <= most:
            return None
        (w,) = problem.quantized
        in_bytes = isinstance(w, Matrix) or (w.qtype.bits == 8 and w.multiplier is None)
        return cls() if in_bytes and w.groups > 1 and w.scale.shape[1] == 1 else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.matrices()
        scale = _along(w.scale, w.shape[2])
        zero_point = None if w.zero_point is None else _along(w.zero_point, w.shape[2])
        codes = dataclasses.replace(w, scale=jnp.ones((1, 1, 1), w.scale.dtype), zero_point=zero_point)
        count = digit_count(_SCALED)
        return problem.restored(int8_blocks(digit_matrix(x.astype(jnp.float32) * scale, count), codes, count))


def _along(value: jax.Array, length: int) -> jax.Array:
    """[..., G] as [..., K]."""
    return jnp.repeat(value, length // value.shape[2], axis=2)


def _most_rows(problem: Product) -> float:
    """Most rows of an int8 dot for a problem; negative if the problem cannot be split."""

    if problem.wide or math.isinf(problem.length):
        return -1
    int8, (x, w) = machine.int8_dots(), problem.forms
    if int8 == "none" or not isinstance(x, jax.ShapeDtypeStruct) or not isinstance(w, Matrix | Packed) or not w.integer:
        return -1
    exact = not is_highest(problem.precision) and x.dtype == jnp.bfloat16
    return most_rows(int8, exact=exact, whole=isinstance(w, Matrix) and not problem.trained)


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


def digit_matrix(x: jax.Array, count: int) -> Matrix:
    """A float [B, M, K] as int8 [B, digits * M, K]: the rows of the first digit, then those of the second, ..."""
    digits, scale = digits_of(x, count, 2)
    weights = jnp.concatenate([scale * (1 / 254) ** i for i in range(count)], axis=1)
    return Matrix(jnp.concatenate(digits, axis=1), weights, None, _DIGIT)
