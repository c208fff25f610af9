"""Blocked dequantization: float dots with blocks of the weight's rows that are decoded one at a time.

Values are float32. With a bfloat16 activation, on a CPU with bfloat16 instructions, they are bfloat16 if that is exact,
or if there are rows enough to pay for rounding them (see `jaxquant.ops.kernels.dequantized`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.sizes import number
from jaxquant.core.types import Index
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.cpu.blocks import LARGEST, by_blocks, in_branch, slice_of, total
from jaxquant.ops.kernels.cpu.dots import float_dot
from jaxquant.ops.kernels.cpu.floats import value_dtype
from jaxquant.ops.kernels.cpu.int8 import LONG_GROUP
from jaxquant.ops.kernels.integer import multiplies_integers
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["Blocked", "BlockedIntegers"]

_FEW_ROWS = 128
_LONG_DOT = 64  # rows from which a dot of codes in bfloat16 is faster than in int8, with vector instructions


@dataclasses.dataclass(frozen=True)
class Blocked(Kernel[Product]):
    """Blocked dequantization of a stored weight of any type.

    Attributes:
      dtype: of the values.
    """

    platforms = ("cpu",)

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the values, and the word "blocks"."""
        return f"{jnp.dtype(self.dtype).name} blocks"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`."""
        return None if None in problem.forms or problem.trained or problem.wide else cls(value_dtype(problem))

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.canonical()
        scale = None
        if isinstance(x, Packed):
            x = x.unpacked()
        if isinstance(x, Matrix) and self.dtype == jnp.bfloat16:
            (x,), scale = x.numbers(self.dtype)
        elif isinstance(x, Matrix):
            x = x.values(jnp.float32)
        out = float_blocks(x.astype(self.dtype), w, problem.precision)
        return problem.restored(out, scale)


class BlockedIntegers(Kernel[Product]):
    """Blocked dequantization of integers that are exact in bfloat16, on one core without tiles, from 64 rows on.

    Products are exact too, with sums in float32. (Several cores share one int8 dot better than a loop.)
    """

    platforms = ("cpu",)

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`."""
        if problem.rows < _LONG_DOT or problem.wide or machine.int8_dots() != "vectors" or machine.cores() > 1:
            return None
        exact = machine.bfloat16_dots() and problem.both(lambda form: form.exact_in(jnp.bfloat16))
        return Blocked(jnp.bfloat16) if exact and multiplies_integers(problem, LONG_GROUP) else None


def float_blocks(x: jax.Array, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    """The product with the real values, [B, M, K] x [B, N, K] -> [B, M, N], in x's dtype, with sums in float32.

    Up to 128 rows the weight is the left operand, which XLA's CPU library reads fastest; a single row has no fast path
    and is padded to two. With more rows, arithmetic is the bound and the activation goes left. The barriers make XLA
    decode a block once instead of once per use, and keep the weight on its side.
    """
    rows, columns = x.shape[1], w.shape[1]
    many, padded = number(rows) > _FEW_ROWS, _two_rows(x)
    parts = [padded[:, :, i :: w.planes] for i in range(w.planes)]

    def multiply(block: Matrix | Packed, b: Index, _: Index) -> jax.Array:
        values, scale = _decoded(block, x.dtype)
        planes = lax.optimization_barrier([_two_rows(plane) for plane in values])
        xs = [slice_of(part, b, block.shape[0], 0) for part in parts]
        pairs = zip(xs, planes, strict=True)
        if many:
            out = total(float_dot(x, plane, precision=precision) for x, plane in pairs)
        else:
            out = total(float_dot(plane, x, precision=precision) for x, plane in pairs)
            out = jnp.swapaxes(lax.optimization_barrier(out), 1, 2)
        out = out[:, :rows, :columns]
        return out if scale is None else out * jnp.swapaxes(scale, 1, 2)

    return by_blocks(x, w, multiply, LARGEST if many else 2 * LARGEST)


def _decoded(block: Matrix | Packed, dtype: DTypeLike) -> tuple[list[jax.Array], jax.Array | None]:
    """Values in planes, and the scales to apply to the sums, or None.

    Codes that cross bytes, and fp8 scales, are decoded in a branch, since fused code is slow.
    """
    in_fp8 = block.multiplier is not None and block.multiplier.dtype != jnp.int8
    apart = block.stored if isinstance(block, Packed) and (block.planes == 1 or in_fp8) else None
    if jnp.dtype(dtype).itemsize == 2 and block.exact_in(dtype):
        return block.numbers(dtype) if apart is None else in_branch(apart, lambda: block.numbers(dtype))
    if apart is None:
        planes = block.floats()
    else:
        codes, scale = in_branch(apart, lambda: (block.code_planes(), block.scales))
        planes = [Matrix(c, scale, block.zero_point, block.qtype, block.offset).values(jnp.float32) for c in codes]
    return [plane.astype(dtype) for plane in planes], None


def _two_rows(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))) if x.shape[1] == 1 else x
