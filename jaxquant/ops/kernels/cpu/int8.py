"""Products of integers on the CPU: int8 dots on the path that XLA's library of fast kernels serves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number
from jaxquant.core.types import Index
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.cpu.blocks import LARGEST, by_blocks, in_branch, rows_of, sum_of_parts
from jaxquant.ops.kernels.cpu.dots import row_dot
from jaxquant.ops.kernels.integer import int8_product, multiplies_integers, planes_product
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["LONG_GROUP", "Int8", "int8_blocks", "int8_sums"]

LONG_GROUP = 1024  # int8 dots of shorter ones are slower than a float dot
_SHORTEST_GROUP = 8  # in float64, where no other kernel is exact
_FEW_ROWS = 48


@dataclasses.dataclass(frozen=True)
class Int8(Kernel[Product]):
    """int8 dots accumulated in int32; packed codes are unpacked a block of rows at a time.

    The multipliers of two-level scales are multiplied into the codes, so that one plain dot suffices.
    """

    platforms = ("cpu",)

    title = "int8"
    exact = True

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: integers in groups of 1024 or more, or one scale per row, if the library serves int8."""
        if machine.int8_dots() == "none" and not problem.wide:
            return None
        if not multiplies_integers(problem, _SHORTEST_GROUP if problem.wide else LONG_GROUP):
            return None
        x, w = problem.quantized
        return cls() if x.groups == 1 or w.shape[2] // x.groups % w.planes == 0 else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.canonical()
        return problem.restored(int8_blocks(x.unpacked() if isinstance(x, Packed) else x, w))


def int8_blocks(x: Matrix, w: Matrix | Packed, parts: int = 1) -> jax.Array:
    """int8 dots [B, parts M, K] x [B, N, K] -> [B, M, N], summed over ``parts`` parts of the rows.

    The weight's codes are exact in int8.
    """
    if isinstance(w, Matrix):  # stored in int8
        return int8_product(x, w, int8_sums, lambda out: sum_of_parts(out, parts, 1))
    planes = [Matrix(x.codes[:, :, i :: w.planes], x.scale, x.zero_point, x.qtype) for i in range(w.planes)]

    def multiply(block: Matrix | Packed, b: Index, _: Index) -> jax.Array:
        def unpacked() -> list[jax.Array]:
            return [plane.codes for plane in block.int8()]

        codes = in_branch(block.stored, unpacked) if block.planes == 1 else lax.optimization_barrier(unpacked())
        weights = [Matrix(c, p.scale, p.zero_point, p.qtype) for c, p in zip(codes, block.int8(), strict=True)]
        rows = [rows_of(plane, b, block.shape[0], 0, plane.shape[1]) for plane in planes]
        return planes_product(rows, weights, int8_sums, lambda out: sum_of_parts(out, parts, 1))

    return by_blocks(x.codes[:, : x.shape[1] // parts], w, multiply, 4 * LARGEST)


def int8_sums(lhs: jax.Array, rhs: Matrix) -> jax.Array:
    """int8 [B, M, K] x [B, N, K] -> int32 [B, M, N].

    A single row has no fast path, so it is padded to two. If one operand has few rows, the other (the weight, at
    inference) is the left one; the barrier keeps XLA from turning transpose(dot(w, x)) back into dot(x, w), which is
    slower. An operand that is stored with its rows last stays right, where the fast path takes it without a copy. XLA
    recognizes this layout except in stacks of matrices, where a transpose states it.
    """
    codes, rows, columns = rhs.codes, lhs.shape[1], rhs.shape[1]
    if rows == 1:
        lhs = jnp.pad(lhs, ((0, 0), (0, 1), (0, 0)))
    if columns == 1:
        codes = jnp.pad(codes, ((0, 0), (0, 1), (0, 0)))
    few, batched = number(rows) <= min(_FEW_ROWS, number(columns)), lhs.shape[0] != 1
    if few and not rhs.rows_last:
        out = jnp.swapaxes(lax.optimization_barrier(row_dot(codes, lhs, preferred_element_type=jnp.int32)), 1, 2)
    elif few and batched:
        numbers = (((2,), (1,)), ((0,), (0,)))
        out = lax.dot_general(lhs, jnp.swapaxes(codes, 1, 2), numbers, preferred_element_type=jnp.int32)
    else:
        out = row_dot(lhs, codes, preferred_element_type=jnp.int32)
    return out[:, :rows, :columns]
