"""How a product of canonical matrices is computed: the one place where that is chosen.

A formulation takes an activation ``[B, M, K]``, a quantized `Matrix` or a float array, and a weight ``[B, N, K]``, and
returns the product ``[B, M, N]``, in float32 unless an operand is float64. On the CPU:

| weight | activation | rows M | formulation |
|---|---|---|---|
| integer, one scale per row or two-level | integer, one scale per row | any, but see below | `integer` |
| integer, groups of 1024 or more | integer, likewise | any | `integer` |
| integer, one scale per row or two-level | float | few, see `digit_rows` | `digits` |
| integer, scales along K and the same for all rows | float | likewise | `folded` |
| integer, fp8, or 4 bits of another kind | any | 1 | `lanes`, if `jaxquant.ops.lanes.fits` |
| anything else that is stored quantized | any | any | `blocks` |
| float64 operands; what is quantized on the way | | | `dequantized` |

`integer`
: int8 dots accumulated in int32, zero points corrected exactly (`jaxquant.ops.integer`). Packed codes are unpacked a
  block of rows at a time; the multipliers of two-level scales go into the codes, so that it stays one plain dot.

`digits`
: the same, with the activation as int8 digits, further rows of one int8 dot (`jaxquant.ops.digits`).

`folded`
: the same, with the scales as factors of the activation, in three digits. A cache of values with a scale per token is
  such a weight.

`lanes`
: a loop over the weight's codes that decodes and multiplies (`jaxquant.ops.lanes`).

`blocks`
: float dots with blocks of rows that are dequantized one at a time (`jaxquant.ops.blockwise`).

`minifloat`
: a bfloat16 dot of fp8 or fp4 with one scale per row on either side, or powers of two (the MX formats): exact products,
  float32 accumulation. Off the CPU, and in training where a CPU has instructions for bfloat16.

`dequantized`
: a float dot of the dequantized operands.

With vectors (`jaxquant.ops.machine`) and instructions for bfloat16, on one core, `blocks` take the place of `integer`
from 64 rows on: integers of 8 bits and their products are exact there too, with sums in float32. `blocks` of MX formats
on both sides are multiplied so from 24 rows on, on any number of cores.

Float values are multiplied in float32; beside a bfloat16 or float16 activation in that dtype, with sums in float32,
where that is fast and loses nothing that the float program would keep (`jaxquant.ops.floats`).

Rows whose number is a symbol, in a program that is exported for every batch, count as many. Where K is one, products
of integers are float products too.

Where XLA does not serve int8 dots (`jaxquant.ops.machine`), `lanes` and `blocks` take the place of `integer`,
`digits` and `folded`. Off the CPU XLA fuses the conversion into the dot, and float units are wide: products of integers
are `integer`, one dot per group of 8 or more, and all others but `minifloat` are `dequantized`. There weights with one
code per element have products of their own, in `jaxquant.ops.decoded`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import promoted
from jaxquant.core.layout import number
from jaxquant.ops.blockwise import float_blocks, integer_blocks
from jaxquant.ops.digits import digit_count, is_highest
from jaxquant.ops.floats import float_dot, float_dtype, scaled
from jaxquant.ops.integer import common_group
from jaxquant.ops.lanes import fits, lanes
from jaxquant.ops.machine import Int8, bfloat16_dots, cores, int8_dots
from jaxquant.ops.matrix import Matrix, Packed

__all__ = ["Formulation", "choose", "digit_rows", "is_float", "product", "way"]

Formulation = Literal["integer", "digits", "folded", "lanes", "blocks", "minifloat", "dequantized"]
Operand = Matrix | Packed | jax.Array

_SHORTEST_GROUP = 8  # off the CPU, a loop of shorter int8 dots costs more than a float dot
_LONG_GROUP = 1024  # on the CPU

_LONG_DOT = 64  # with vectors, from here on a dot of codes in bfloat16 is faster than one of int8

_FOLDED = lax.Precision.HIGHEST  # three digits

_DIGIT_ROWS: dict[Int8, float] = {"tiles": float("inf"), "vectors": 48, "none": 0}
_DIGIT_ROWS_BESIDE_BFLOAT16 = 24


def digit_rows(int8: Int8, *, exact: bool, whole: bool = False) -> float:
    """Most rows of an int8 dot, digits times M, up to which `digits` is faster than `blocks` on such a machine.

    Tiles are faster at any number. With vectors an int8 dot is about 1.7 times as fast as a float32 dot once the
    arithmetic counts, which two digits use up (benchmarks/matmul.py). A ``whole`` weight is one dot in digits, which
    cores share better than the loop over blocks that it would be otherwise: twice as many rows.

    An activation that is ``exact`` in bfloat16 needs no digits: products with codes are exact in `blocks`, and as fast
    where a machine multiplies bfloat16, with tiles or without. So it has digits only at the few rows where reading the
    weight is all that counts, the same on every machine, so that all are equally accurate at many.
    """
    if exact:
        return min(_DIGIT_ROWS[int8], _DIGIT_ROWS_BESIDE_BFLOAT16)
    return _DIGIT_ROWS[int8] * (2 if whole and cores() > 1 else 1)


def choose(
    platform: str, x: Operand, w: Matrix | Packed, precision: lax.PrecisionLike, *, trained: bool = False
) -> Formulation:
    """The formulation of a product.

    Args:
      platform: what the program is lowered for, ``"cpu"`` or another.
      x: the activation.
      w: the weight.
      precision: gives the number of digits.
      trained: whether the weight is a float array that is quantized on the way, and its real values cost nothing.
    """
    operands, rows, length = (x, w), number(x.shape[1]), number(w.shape[2])
    wide = any(_scale_dtype(v) == jnp.float64 for v in (x, w))
    if _both(operands, lambda v: v.minifloat) and not wide and (platform != "cpu" or (trained and bfloat16_dots())):
        return "minifloat"
    bounded = length < math.inf  # or a sum of products could overflow
    integers = bounded and _both(operands, lambda v: v.integer)
    if platform != "cpu" or wide:
        return "integer" if integers and _group(x, w) >= min(_SHORTEST_GROUP, length) else "dequantized"
    int8 = int8_dots()
    in_planes = isinstance(x, jax.Array) or x.groups == 1 or w.shape[2] // x.groups % w.planes == 0
    if int8 != "none" and integers and in_planes and _group(x, w) >= min(_LONG_GROUP, length):
        alone = int8 == "vectors" and cores() == 1  # several cores share one dot better than a loop
        exact = _both(operands, lambda v: v.exact_in(jnp.bfloat16))
        return "blocks" if alone and rows >= _LONG_DOT and exact and bfloat16_dots() else "integer"
    if int8 != "none" and isinstance(x, jax.Array) and w.integer and bounded:
        exact = not is_highest(precision) and x.dtype == jnp.bfloat16
        most = digit_rows(int8, exact=exact, whole=isinstance(w, Matrix) and not trained)
        if w.groups == 1 and digit_count(precision) * rows <= most:
            return "digits"
        if _folds(w) and digit_count(_FOLDED) * rows <= most:
            return "folded"
    if trained:
        return "dequantized"
    return "lanes" if x.shape[1] == 1 and fits(w, exact=is_highest(precision)) else "blocks"


def is_float(x: Operand, w: Operand, precision: lax.PrecisionLike) -> bool:
    """Whether a product with a weight in training is the float product on every platform."""
    x, w = _weight_last(x, w)
    return all(choose(platform, x, w, precision, trained=True) == "dequantized" for platform in ("cpu", "other"))


def _weight_last(x: Operand, w: Operand) -> tuple[Operand, Matrix | Packed]:
    """The same, but that a float array is the activation."""
    x, w = (w, x) if isinstance(w, jax.Array) else (x, w)
    assert not isinstance(w, jax.Array)
    return x, w


def _scale_dtype(x: Operand) -> Any:
    return x.dtype if isinstance(x, jax.Array) else x.scale.dtype


def _both(operands: tuple[Operand, Operand], test: Callable[[Matrix | Packed], bool]) -> bool:
    return all(not isinstance(x, jax.Array) and test(x) for x in operands)


def _group(*operands: Operand) -> int:
    return common_group(*(x for x in operands if not isinstance(x, jax.Array)))


def way(
    platform: str, x: Operand, w: Operand, precision: lax.PrecisionLike, dtype: Any, *, trained: bool = False
) -> tuple[Formulation, Any]:
    """How a product is computed, from what `choose` and `float_dtype` take: the formulation, the dtype of values."""
    x, w = _weight_last(x, w)
    how = choose(platform, x, w, precision, trained=trained)
    return how, float_dtype(platform, x, w, precision, dtype) if how in ("blocks", "dequantized") else jnp.float32


def product(x: Operand, w: Operand, precision: lax.PrecisionLike, dtype: Any, *, trained: bool = False) -> jax.Array:
    """[B, M, K] x [B, N, K] -> [B, M, N]; the weight is ``w``, unless only ``x`` is quantized.

    ``dtype`` is that of the float product, by the operands' own dtypes.
    """
    if isinstance(w, jax.Array):
        return jnp.swapaxes(product(w, x, precision, dtype, trained=trained), 1, 2)
    x, whole = x if isinstance(x, jax.Array) else _unpacked(x), _unpacked(w)

    def run(how: Formulation, dtype: Any, w: Matrix | Packed) -> jax.Array:
        if isinstance(x, jax.Array):
            return _RUN[how](x.astype(dtype), w, precision)
        if how != "blocks":
            return _RUN[how](x, w, precision)
        if dtype == jnp.bfloat16:
            (numbers,), scale = x.numbers(dtype)
            return scaled(float_blocks(numbers, w, precision), scale, None)
        return float_blocks(x.values(jnp.float32), w, precision)

    cpu, other = (way(platform, x, w, precision, dtype, trained=trained) for platform in ("cpu", "other"))
    if cpu == other and w is whole:
        return run(*cpu, w)
    on_cpu, elsewhere = functools.partial(run, *cpu, w), functools.partial(run, *other, whole)
    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def _unpacked(w: Matrix | Packed) -> Matrix:
    return w.unpacked() if isinstance(w, Packed) else w


def _folds(w: Matrix | Packed) -> bool:
    """Whether a weight has a byte per code, and scales along K that are the same for all rows."""
    in_bytes = isinstance(w, Matrix) or (w.qtype.bits == 8 and w.multiplier is None)
    return in_bytes and w.groups > 1 and w.scale.shape[1] == 1


def _folded(x: jax.Array, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    """A scale that does not depend on the row n of the weight is a factor of the activation, and codes are left:

        sum_k x[m, k] (s[k] (c[n, k] - z[k]))  =  sum_k (x[m, k] s[k]) (c[n, k] - z[k])

    Rows of x s have a wider range than those of x, for which two digits do; the third costs nothing at one row.
    """
    del precision
    w = _unpacked(w)
    scale = _along(w.scale, w.shape[2])
    zero_point = None if w.zero_point is None else _along(w.zero_point, w.shape[2])
    codes = dataclasses.replace(w, scale=jnp.ones((1, 1, 1), w.scale.dtype), zero_point=zero_point)
    return integer_blocks(x * scale, codes, _FOLDED)


def _along(value: jax.Array, length: int) -> jax.Array:
    """[..., G] as [..., K]."""
    return jnp.repeat(value, length // value.shape[2], axis=2)


def _minifloat(x: Matrix, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    """fp8 and fp4 values, and those times powers of two, are exact in bfloat16; their products are in float32."""
    del precision
    ((left,), rows), ((right,), columns) = (v.numbers(jnp.bfloat16) for v in (x, _unpacked(w)))
    return scaled(float_dot(left, right), rows, columns)


def _dequantized(x: Matrix | jax.Array, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    wide, w = promoted(_scale_dtype(x), w.scale.dtype), _unpacked(w)
    if isinstance(x, jax.Array) and x.dtype.itemsize == 2:
        if w.exact_in(x.dtype):
            (values,), scale = w.numbers(x.dtype)
            return scaled(float_dot(x, values), None, scale)
        return float_dot(x, w.values(wide).astype(x.dtype))
    x = x.values(wide) if isinstance(x, Matrix) else x.astype(wide)
    return float_dot(x, w.values(wide), precision=precision)


_RUN: dict[str, Callable[..., jax.Array]] = {
    "integer": integer_blocks,
    "digits": integer_blocks,
    "folded": _folded,
    "lanes": lanes,
    "blocks": float_blocks,
    "minifloat": _minifloat,
    "dequantized": _dequantized,
}
