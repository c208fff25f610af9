"""Dots of decoded codes in the form that a TPU runs fast."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtensor import QTensor
from jaxquant.ops.kernels import decoded
from jaxquant.ops.kernels.decoded import Dot
from jaxquant.ops.kernels.tpu.activation import FEW
from jaxquant.ops.kernels.tpu.chips import MULTIPLY_FLOATS_ONLY
from jaxquant.ops.problem import Kernel, Product

__all__ = ["BatchedDecoded", "Float8Decoded", "is_fp8_of_columns"]

_ROWS, _GROUP = 16, 128  # most rows, and the smallest group


class BatchedDecoded(decoded.BatchedDecoded):
    """`decoded.BatchedDecoded` for all exact values, with at least two rows."""

    platforms = ("tpu",)

    @classmethod
    def is_faster(cls, problem: Product, group: int) -> bool:
        """As for `decoded.BatchedDecoded`, by the compiler's estimate."""
        return problem.rows <= _ROWS and group >= _GROUP

    @staticmethod
    def dot(dot: Dot) -> jax.Array:
        """As for `decoded.BatchedDecoded`, padded to two rows: a single row of sums would get a layout of its own."""
        free, batch = dot.numbers.free(0, dot.x.ndim), len(dot.numbers.batch[0])
        if not free or any(dot.x.shape[i] != 1 for i in free):
            return dot.batched()
        x = jnp.pad(dot.x, [(0, int(i == free[0])) for i in range(dot.x.ndim)])
        return lax.slice_in_dim(dataclasses.replace(dot, x=x).batched(), 0, 1, axis=batch)


class Float8Decoded(decoded.Decoded):
    """Many rows of fp8 by fp8, on chips that multiply fp8 as such. Kernels multiply bfloat16."""

    platforms = ("tpu",)
    chips = MULTIPLY_FLOATS_ONLY

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: with one scale per row and per column."""
        x, w = problem.x, problem.w
        if not isinstance(x, QTensor) or not isinstance(w, QTensor) or problem.rows <= FEW:
            return None
        return super().takes(problem) if is_fp8_of_columns(w) and x.type.kind == "float" else None


def is_fp8_of_columns(w: QTensor) -> bool:
    """Whether a weight is fp8 in its own dtype, with one scale per column."""
    return w.seal is not None and w.split is None
