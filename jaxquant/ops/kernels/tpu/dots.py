"""Dots in the form that the TPU's compiler runs fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import QTensor
from jaxquant.core.sizes import number
from jaxquant.ops.kernels.tpu.chips import V5E
from jaxquant.ops.problem import Product

__all__ = ["as_it_is", "decodes_in_products", "has_few_rows", "is_read_in_product", "two_row_dot"]

_FEW = 128

_NEAR = 96 << 20
"""Bytes of a weight that XLA moves to the chip's own memory, of 128 MiB, before it multiplies the weight."""


def has_few_rows(problem: Product) -> bool:
    """Whether a result is small compared to its weight, so that `as_it_is` is free."""
    return 1 < problem.rows <= _FEW


def is_read_in_product(w: QTensor) -> bool:
    """Whether XLA's product reads a stored weight while it multiplies: a layer of a stack, or a large weight.

    That takes it 1.2 to 1.8 times as long as reading alone, where kernels take as long as that. False of a weight with
    a symbolic size, for which no kernel has blocks.
    """
    size = number(w.nbytes)
    return size < math.inf and (w.layer is not None or size > _NEAR)


def decodes_in_products(target: Target, rows: int) -> bool:
    """Whether XLA's product makes real values of int8 codes and of scales along the summed axis at no cost.

    The other operand times the scales is one more array in memory. Estimates for a gradient [M, 4096] by codes
    [4096, 4096], in thousand cycles: 1,082 decoded and 1,304 with that array for 4,096 rows on a v5e, 67 and 76 for
    128. For 8 rows, decoding takes longer. On a v6e the vector unit decodes more slowly than the matrix unit
    multiplies: 469 and 434 for 4,096 rows.
    """
    return target.platform == "tpu" and target.chip == V5E and _FEW <= number(rows) < math.inf


def as_it_is(result: jax.Array) -> jax.Array:
    """Keeps the layout of a product's result from propagating back to its weight.

    Where a result is split into heads, this compiler gives the product's weight that shape too. A scan then copies the
    layer that it takes out of a stack before multiplying it: 201 thousand cycles for 16 MB of int8.
    """
    return lax.optimization_barrier(result)


def two_row_dot(
    dot: Callable[[jax.Array, jax.Array], jax.Array], lone: Sequence[int | None], *operands: jax.Array
) -> jax.Array:
    """``dot`` with a single row padded to two.

    The compiler multiplies one row, or one column, in the vector units, and two in the matrix unit, in a tenth of the
    time.

    Args:
      dot: a `jax.lax.dot_general` with its dimension numbers.
      lone: for each operand, the size-1 axis of its single row; None if it has several rows.
      *operands: the operands.
    """
    shape = jax.eval_shape(dot, *operands).shape
    padded = (
        v if axis is None else jnp.pad(v, [(0, int(i == axis)) for i in range(v.ndim)])
        for v, axis in zip(operands, lone, strict=True)
    )
    out = dot(*padded)
    return lax.slice(out, [0] * out.ndim, shape)
