"""Dots as the TPU's compiler is best asked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.ops.problem import Product

__all__ = ["as_it_is", "has_few_rows", "two_row_dot"]

_FEW = 128


def has_few_rows(problem: Product) -> bool:
    """Whether a result is small beside its weight, so that it costs nothing to keep it `as_it_is`."""
    return 1 < problem.rows <= _FEW


def as_it_is(result: jax.Array) -> jax.Array:
    """The result of a product, whose columns what follows does not cut.

    Where a result is cut into heads, this compiler gives the weight of the product that shape. The layer that a scan
    takes out of a stack is copied then, before it is multiplied: 201 thousand cycles for 16 MB of int8.
    """
    return lax.optimization_barrier(result)


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
