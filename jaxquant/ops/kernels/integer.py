"""Products of integers: int8 dots accumulated in int32, zero points corrected exactly."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import promoted
from jaxquant.core.types import Index
from jaxquant.ops.kernels.dots import dot
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = [
    "Int8",
    "Sums",
    "common_group",
    "int8_product",
    "int8_sums",
    "multiplies_integers",
    "overflow_limit",
    "planes_product",
]

_INT32_MAX = 2**31 - 1

Sums = Callable[[jax.Array, Matrix], jax.Array]
"""int8 [B, M, K] times the codes of a matrix [B, N, K], in int32 [B, M, N]."""


@dataclasses.dataclass(frozen=True)
class Int8(Kernel[Product]):
    """An int8 dot accumulated in int32, and scaled in float32.

    (One dot per group of the contraction, scaled and summed, would take many times as long as a float dot.)
    """

    platforms = ("tpu", "cuda", "other")

    title = "int8"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: off the CPU, which has faster kernels of its own."""
        return cls() if multiplies_integers(problem) else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return int8_product(*problem.matrices(), int8_sums, split=problem.split)


def multiplies_integers(problem: Product, shortest: float = math.inf) -> bool:
    """Whether both operands are integers with groups of ``shortest`` or more, or one per row, and a known length K."""
    if math.isinf(problem.length) or not problem.both(lambda form: form.integer):
        return False
    return common_group(*problem.quantized) >= min(shortest, problem.length)


def int8_sums(lhs: jax.Array, rhs: Matrix) -> jax.Array:
    """`Sums`, by one dot."""
    return dot(lhs, rhs.codes, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.int32)


def _corrected(lhs: jax.Array, rhs: Matrix, lz: jax.Array | None, rz: jax.Array | None, sums: Sums) -> jax.Array:
    """sum_k (lhs - lz)(rhs - rz) in int32: exact whenever the result fits, since wrap-around cancels.

    ``rz`` has one entry per row; if ``lz`` is None, it may have one entry per k instead, shared by all rows.
    """
    out = sums(lhs, rhs)
    if rz is not None and rz.shape[2] > 1:
        return out - jnp.sum(lhs.astype(rz.dtype) * rz, axis=2, keepdims=True, dtype=jnp.int32)
    if rz is not None:
        rz = jnp.swapaxes(rz, 1, 2)
        out = out - rz * jnp.sum(lhs, axis=2, dtype=jnp.int32)[:, :, None]
    if lz is not None:
        out = out - lz * jnp.sum(rhs.codes, axis=2, dtype=jnp.int32)[:, None, :]
    if lz is not None and rz is not None:
        out = out + lz * rz * jnp.int32(lhs.shape[2])
    return out


def overflow_limit(lhs_reach: int, rhs_reach: int) -> int:
    """The largest number of products of these magnitudes whose sum always fits an int32."""
    return max(_INT32_MAX // (lhs_reach * rhs_reach), 1)


def common_group(*operands: Matrix | Packed) -> int:
    """The longest run of K over which all scales are constant."""
    runs = [x.shape[2] // x.groups for x in operands if x.groups != 1]
    return math.gcd(*runs) if runs else operands[0].shape[2]


def planes_product(
    lhs: Sequence[Matrix], rhs: Sequence[Matrix], sums: Sums, combine: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`int8_product` of operands that are split into planes.

    Where a row has one scale, the sums of planes are added in int32, so that the result equals that of undivided codes
    to the last bit.
    """
    left, right = lhs[0], rhs[0]
    length = sum(plane.codes.shape[2] for plane in lhs)
    if max(left.groups, right.groups) > 1 or length > overflow_limit(left.reach, right.reach):
        products = [int8_product(x, w, sums, combine) for x, w in zip(lhs, rhs, strict=True)]
        return functools.reduce(jnp.add, products)
    exact = [_corrected(x.codes, w, x.zero_point, w.zero_point, sums) for x, w in zip(lhs, rhs, strict=True)]
    out = functools.reduce(jnp.add, exact).astype(jnp.float32)
    return combine(out * left.scale * jnp.swapaxes(right.scale, 1, 2))


def _unchanged(out: jax.Array) -> jax.Array:
    return out


def int8_product(
    lhs: Matrix,
    rhs: Matrix,
    sums: Sums,
    combine: Callable[[jax.Array], jax.Array] = _unchanged,
    split: Callable[[jax.Array], jax.Array] = _unchanged,
) -> jax.Array:
    """Integer dots, each exact in int32, scaled, combined and summed in float32.

    The contraction is split where a scale or a zero point changes, and where a longer sum could overflow. ``combine``
    is linear and may shrink the result, so it is applied before the result is written to memory. ``split`` gives sums
    and scales, [B or 1, M or 1, N or 1], the axes of the result.
    """
    k, group = lhs.codes.shape[2], common_group(lhs, rhs)
    limit = overflow_limit(lhs.reach, rhs.reach)
    dtype = promoted(lhs.scale.dtype, rhs.scale.dtype)
    real = promoted(dtype, jnp.float32)

    def part(start: Index, size: int) -> jax.Array:
        """Scaled product of ``size`` codes from ``start``, all in one group of either side."""

        def at(value: jax.Array) -> jax.Array:
            if value.shape[2] == 1:
                return value
            run = k // value.shape[2]
            return lax.dynamic_slice_in_dim(value, start // run, max(size // run, 1), axis=2)

        left, right = (
            x if size == k else dataclasses.replace(x, codes=lax.dynamic_slice_in_dim(x.codes, start, size, axis=2))
            for x in (lhs, rhs)
        )
        lz, rz = (None if x.zero_point is None else at(x.zero_point) for x in (lhs, rhs))
        out = split(_corrected(left.codes, right, lz, rz, sums)).astype(jnp.float32).astype(real)
        rows, columns = at(lhs.scale).astype(real), jnp.swapaxes(at(rhs.scale), 1, 2).astype(real)
        return combine(out * split(rows) * split(columns))

    if group > limit:  # few, long cuts of unequal length
        cuts = [part(c + s, min(limit, group - s)) for c in range(0, k, group) for s in range(0, group, limit)]
        return functools.reduce(jnp.add, cuts)
    if group == k:
        return part(0, k)
    # Zeros that vary over devices as the codes do; zeros_like does so in newer JAX only.
    left, right = ((x.codes[:, :, :1] * 0).astype(dtype) for x in (lhs, rhs))
    start = combine(split(left) + split(jnp.swapaxes(right, 1, 2)))
    return lax.fori_loop(0, k // group, lambda i, total: total + part(i * group, group), start)
