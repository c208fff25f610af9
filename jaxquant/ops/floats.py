"""Products in floating point: in which dtype, and how XLA is asked for them.

A bfloat16 or float16 activation is multiplied as it is, by values of that dtype, with sums in float32; products of two
such numbers are exact there. A weight's values are given that dtype

- where it holds them exactly: integers and fp8 with one scale per row, which is then applied to the sums;
- where it is the weight's own dtype (`QTensor.dtype`), so that the float program has its values so too. Each is then
  off by at most 2**-8 of itself in bfloat16, and by 2**-11 in float16 unless it is subnormal.

Everywhere else, and at ``precision=HIGHEST``, values are float32. On the CPU only bfloat16 is multiplied so, where
there are instructions for it (`jaxquant.ops.machine`), and values are rounded to it where many rows make up for that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.ops.digits import is_highest
from jaxquant.ops.machine import bfloat16_dots
from jaxquant.ops.matrix import Matrix, Packed

__all__ = ["float_dot", "float_dtype", "is_exact", "is_narrow"]

_NARROW = (jnp.bfloat16, jnp.float16)
_MANY_ROWS = 24  # with fewer, a block of the weight in bfloat16 costs more than the product gains


def is_narrow(platform: str, dtype: Any) -> bool:
    """Whether products in a dtype of two bytes are fast."""
    return dtype in _NARROW if platform != "cpu" else dtype == jnp.bfloat16 and bfloat16_dots()


def is_exact(x: Any, w: Matrix | Packed) -> bool:
    """Whether a CPU multiplies both in bfloat16, exactly, with a scale for each row of either side on the sums."""
    exact = not isinstance(x, jax.Array) and x.one_scale and w.one_scale
    return exact and x.shape[1] >= _MANY_ROWS and is_narrow("cpu", jnp.bfloat16)


def float_dtype(platform: str, x: Any, w: Matrix | Packed, precision: lax.PrecisionLike, dtype: Any) -> Any:
    """The dtype of the values that a float product multiplies.

    Args:
      platform: what the program is lowered for, ``"cpu"`` or another.
      x: the activation, [B, M, K].
      w: the weight, [B, N, K].
      precision: of the call.
      dtype: of the float product, as the operands' own dtypes have it.
    """
    if not isinstance(x, jax.Array):
        return jnp.bfloat16 if platform == "cpu" and is_exact(x, w) else w.scale.dtype
    if jnp.float64 in (x.dtype, w.scale.dtype):
        return jnp.float64
    default = not is_highest(precision) and not isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)
    if not (default and is_narrow(platform, x.dtype)) or (platform == "cpu" and x.shape[1] == 1):
        return jnp.float32
    rounded = dtype == x.dtype and (platform != "cpu" or x.shape[1] >= _MANY_ROWS)
    return x.dtype if w.one_scale or rounded else jnp.float32


def float_dot(left: jax.Array, right: jax.Array, along: tuple[int, int] = (2, 2), precision: Any = None) -> jax.Array:
    """The sum over an axis of each, [B, ., .] x [B, ., .], in the operands' dtype, and at least in float32.

    On the CPU bfloat16 has a fast path to a float32 result alone, and one row has none.
    """

    def dot(left: jax.Array, right: jax.Array, **how: Any) -> jax.Array:
        return lax.dot_general(left, right, (((along[0],), (along[1],)), ((0,), (0,))), **how)

    def wide(left: jax.Array, right: jax.Array) -> jax.Array:
        return dot(left.astype(jnp.float32), right.astype(jnp.float32), precision=precision)

    def narrow(left: jax.Array, right: jax.Array) -> jax.Array:
        return dot(left, right, preferred_element_type=jnp.float32)

    if left.dtype not in _NARROW:
        return dot(left, right, precision=precision)
    rows = (x.shape[3 - axis] for x, axis in zip((left, right), along, strict=True))
    if is_narrow("cpu", left.dtype) and min(rows) > 1:
        return narrow(left, right)
    return lax.platform_dependent(left, right, cpu=wide, default=narrow)
