"""Dots as the TPU's compiler is best asked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["two_row_dot"]


def two_row_dot(
    dot: Callable[[jax.Array, jax.Array], jax.Array], lone: Sequence[int | None], *operands: jax.Array
) -> jax.Array:
    """``dot`` of two rows at least.

    The compiler multiplies one row, or one column, in the vector units, and two in the matrix unit in a tenth of the
    time. So one is padded to two.

    Args:
      dot: a `jax.lax.dot_general` with its dimension numbers.
      lone: for each operand, an axis of size 1 that stands for all its rows; None: it has several.
      *operands: the operands.
    """
    shape = jax.eval_shape(dot, *operands).shape
    padded = (
        v if axis is None else jnp.pad(v, [(0, int(i == axis)) for i in range(v.ndim)])
        for v, axis in zip(operands, lone, strict=True)
    )
    out = dot(*padded)
    return lax.slice(out, [0] * out.ndim, shape)
