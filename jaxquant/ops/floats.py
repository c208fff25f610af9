"""Products in floating point: in which dtype, and how XLA is asked for them.

A bfloat16 or float16 activation is multiplied as it is, by values of that dtype, with sums in float32; products of two
such numbers are exact there. A weight's values are given that dtype

- where it holds them exactly: integers and fp8 with one scale per row, which is then applied to the sums, and in
  bfloat16 also fp8 and fp4 times powers of two, the MX formats;
- where it is the weight's own dtype (`QTensor.dtype`), so that the float program has its values so too. Each is then
  off by at most 2**-8 of itself in bfloat16, and by 2**-11 in float16 unless it is subnormal.

Everywhere else, and at ``precision=HIGHEST``, values are float32. On the CPU only bfloat16 is multiplied so, where
there are instructions for it (`jaxquant.ops.machine`), and values are rounded to it where many rows make up for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import promoted
from jaxquant.core.layout import number
from jaxquant.ops.digits import is_highest
from jaxquant.ops.machine import bfloat16_dots
from jaxquant.ops.matrix import Matrix, Packed

__all__ = ["float_dot", "float_dtype", "in_own_dtype", "is_narrow", "own_dtype", "scaled", "two_row_dot"]

_NARROW = (jnp.bfloat16, jnp.float16)
_MANY_ROWS = 24  # with fewer, a block of the weight in bfloat16 costs more than the product gains


def is_narrow(platform: str, dtype: Any) -> bool:
    """Whether products in a dtype of two bytes are fast."""
    return dtype in _NARROW if platform != "cpu" else dtype == jnp.bfloat16 and bfloat16_dots()


def float_dtype(platform: str, x: Any, w: Matrix | Packed, precision: lax.PrecisionLike, dtype: Any) -> Any:
    """The dtype of the values that a float product multiplies.

    Args:
      platform: what the program is lowered for, ``"cpu"`` or another.
      x: the activation, [B, M, K].
      w: the weight, [B, N, K].
      precision: of the call.
      dtype: of the float product, as the operands' own dtypes have it.
    """
    few = platform == "cpu" and number(x.shape[1]) < _MANY_ROWS
    if not isinstance(x, jax.Array):
        exact = x.exact_in(jnp.bfloat16) and w.exact_in(jnp.bfloat16)
        return jnp.bfloat16 if platform == "cpu" and not few and exact and bfloat16_dots() else w.scale.dtype
    if jnp.float64 in (x.dtype, w.scale.dtype):
        return jnp.float64
    if not (_is_default(precision) and is_narrow(platform, x.dtype)) or (platform == "cpu" and x.shape[1] == 1):
        return jnp.float32
    if few:  # integers take one instruction to decode
        return x.dtype if w.one_scale and w.integer else jnp.float32
    return x.dtype if w.exact_in(x.dtype) or dtype == x.dtype else jnp.float32


def _is_default(precision: Any) -> bool:
    return not is_highest(precision) and not isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)


def in_own_dtype(
    multiply: Callable[..., jax.Array], x: Any, w: Any, dtypes: tuple[Any, ...], precision: lax.PrecisionLike
) -> jax.Array:
    """``multiply(x, w)`` of real values, wherever no formulation but the float one is left.

    Off the CPU in the dtype of the float program, if that is bfloat16 or float16; otherwise in float32 at least.

    Args:
      multiply: an operation of two arrays of one dtype.
      x, w: real values, in float32 at least where they come from codes.
      dtypes: of both and of the result in the float program.
      precision: of the call.
    """

    def run(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
        return multiply(x.astype(dtype), w.astype(dtype))

    wide, own = promoted(x.dtype, w.dtype), own_dtype(dtypes, precision)
    if own is None or own == wide:
        return run(wide, x, w)
    return lax.platform_dependent(x, w, cpu=functools.partial(run, wide), default=functools.partial(run, own))


def own_dtype(dtypes: tuple[Any, ...], precision: lax.PrecisionLike) -> Any:
    """bfloat16 or float16, if that is all the dtypes and the precision asks for no more; else None."""
    own = dtypes[0]
    return own if set(dtypes) == {own} and own in _NARROW and _is_default(precision) else None


def scaled(out: jax.Array, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """Sums [B, M, N] times the scales [., M or 1, 1] of the activation and [., N or 1, 1] of the weight; None is 1."""
    out = out if rows is None else out * rows
    return out if columns is None else out * jnp.swapaxes(columns, 1, 2)


def float_dot(left: jax.Array, right: jax.Array, along: tuple[int, int] = (2, 2), precision: Any = None) -> jax.Array:
    """The sum over an axis of each, [B, ., .] x [B, ., .], in the operands' dtype, and at least in float32.

    On the CPU bfloat16 has a fast path to a float32 result alone, and one row has none.
    """
    numbers = (((along[0],), (along[1],)), ((0,), (0,)))
    if left.dtype not in _NARROW:
        return two_row_dot(left, right, numbers, precision=precision)

    def wide(left: jax.Array, right: jax.Array) -> jax.Array:
        return lax.dot_general(left.astype(jnp.float32), right.astype(jnp.float32), numbers, precision=precision)

    narrow = functools.partial(two_row_dot, numbers=numbers, preferred_element_type=jnp.float32)
    rows = (x.shape[3 - axis] for x, axis in zip((left, right), along, strict=True))
    if is_narrow("cpu", left.dtype) and min(map(number, rows)) > 1:
        return narrow(left, right)
    return lax.platform_dependent(left, right, cpu=wide, default=narrow)


def two_row_dot(left: jax.Array, right: jax.Array, numbers: Any, **how: Any) -> jax.Array:
    """`jax.lax.dot_general`, of two rows at least on a TPU.

    It multiplies one row, or one column, in its vector units, and two in its matrix unit in a tenth of the time. So one
    is padded to two there.
    """
    dot = functools.partial(lax.dot_general, dimension_numbers=numbers, **how)
    operands, (contract, batch) = (left, right), numbers
    free = [[i for i in range(v.ndim) if i not in (*contract[k], *batch[k])] for k, v in enumerate(operands)]
    lone = [bool(axes) and all(number(v.shape[i]) == 1 for i in axes) for axes, v in zip(free, operands, strict=True)]
    if not any(lone):
        return dot(left, right)

    def padded(*operands: jax.Array) -> jax.Array:
        shape = jax.eval_shape(dot, *operands).shape
        sides = zip(operands, free, lone, strict=True)
        out = dot(*(jnp.pad(v, [(0, int(one and i == axes[0])) for i in range(v.ndim)]) for v, axes, one in sides))
        return lax.slice(out, [0] * out.ndim, shape)

    return lax.platform_dependent(left, right, tpu=padded, default=dot)
