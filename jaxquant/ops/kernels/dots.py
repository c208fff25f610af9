"""Dots in the form that each platform's compiler runs fastest."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number
from jaxquant.ops.kernels.cpu.dots import float_dot as on_cpu
from jaxquant.ops.kernels.precision import NARROW
from jaxquant.ops.kernels.tpu.dots import two_row_dot

__all__ = ["dot", "float_dot"]


def dot(lhs: jax.Array, rhs: jax.Array, numbers: lax.DotDimensionNumbers, **how: Any) -> jax.Array:
    """`jax.lax.dot_general`; on a TPU a single row is padded to two."""
    operands, (contract, batch) = (lhs, rhs), numbers
    free = [[i for i in range(v.ndim) if i not in (*contract[k], *batch[k])] for k, v in enumerate(operands)]
    lone = [
        axes[0] if axes and all(number(v.shape[i]) == 1 for i in axes) else None
        for axes, v in zip(free, operands, strict=True)
    ]
    plain = functools.partial(lax.dot_general, dimension_numbers=numbers, **how)
    if lone == [None, None]:
        return plain(lhs, rhs)
    return lax.platform_dependent(lhs, rhs, tpu=functools.partial(two_row_dot, plain, lone), default=plain)


def float_dot(
    left: jax.Array, right: jax.Array, along: tuple[int, int] = (2, 2), precision: lax.PrecisionLike = None
) -> jax.Array:
    """The sum over an axis of each, [B, ., .] x [B, ., .], in the operands' dtype, and at least in float32."""
    if left.dtype not in NARROW:
        return dot(left, right, _numbers(along), precision=precision)
    how = functools.partial(dot, numbers=_numbers(along), preferred_element_type=jnp.float32)
    cpu = functools.partial(on_cpu, along=along, precision=precision)
    return lax.platform_dependent(left, right, cpu=cpu, default=how)


def _numbers(along: tuple[int, int]) -> lax.DotDimensionNumbers:
    return ((along[0],), (along[1],)), ((0,), (0,))
