"""Ragged products of integers: int8 with int32 accumulation, zero points corrected exactly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.ops.kernels.convolution import is_whole
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.problem import Kernel, RaggedProduct
from jaxquant.ops.quantized_matrix import Matrix

__all__ = ["Int8Ragged"]


@dataclasses.dataclass(frozen=True)
class Int8Ragged(Kernel[RaggedProduct]):
    """An int8 ragged product of integers with one scale per row and one per output channel of each expert."""

    operation = RaggedProduct

    title = "int8"

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: on every platform."""
        x, experts = problem.forms
        if not (is_whole(x) and is_whole(experts)):
            return None
        return cls() if experts.shape[2] <= overflow_limit(x.reach, experts.reach) else None

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`."""
        return _int8_ragged(*problem.matrices(), problem.sizes)


def _int8_ragged(lhs: Matrix, rhs: Matrix, sizes: jax.Array) -> jax.Array:
    """int8 products accumulated in int32, with exact zero-point corrections; lhs [1, M, K], rhs [E, N, K]."""
    x, experts, rows = lhs.codes[0], rhs.codes, lhs.codes.shape[1]
    out = lax.ragged_dot(x, jnp.swapaxes(experts, 1, 2), sizes, preferred_element_type=jnp.int32)
    mine = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=rows)

    def of_row(value: jax.Array) -> jax.Array:
        """[E or 1, N or 1] of each expert to [M, N or 1] of each row's expert."""
        return value[mine] if value.shape[0] > 1 else value

    if rhs.zero_point is not None:
        out = out - of_row(rhs.zero_point[..., 0]) * jnp.sum(x, axis=1, dtype=jnp.int32, keepdims=True)
    if lhs.zero_point is not None:
        sums = jnp.sum(experts, axis=2, dtype=jnp.int32)
        if rhs.zero_point is not None:
            sums = sums - rhs.zero_point[..., 0] * jnp.int32(experts.shape[2])
        out = out - lhs.zero_point[0] * of_row(sums)
    used = jnp.arange(rows)[:, None] < jnp.sum(sizes)  # rows beyond the last group are 0
    return jnp.where(used, out.astype(jnp.float32) * lhs.scale[0] * of_row(rhs.scale[..., 0]), 0)
