"""Products with a weight that is decoded a block of rows at a time, so that it never exists as a whole.

A loop over blocks of rows unpacks a block into a temporary that stays in the cache, multiplies it, and writes its
columns of the result. What is read from memory is the weight as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.layout import number
from jaxquant.ops.digits import digit_count, digit_matrix, digits
from jaxquant.ops.floats import float_dot, scaled
from jaxquant.ops.matrix import Matrix, Packed, slice_of

__all__ = ["BLOCKS", "LARGEST", "SMALLEST", "by_blocks", "float_blocks", "in_branch", "integer_blocks", "total"]

BLOCKS, SMALLEST, LARGEST = 16, 1 << 16, 1 << 19
"""A block is a sixteenth of the weight, but of so many elements, at most 2 MiB in float32.

Twice as many with few rows, which several cores share better, and four times as many in int8.
"""

_FEW_ROWS = 128


def integer_blocks(x: Matrix | jax.Array, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    """int8 dots [B, M, K] x [B, N, K] -> [B, M, N]; a float x is written as int8 digits.

    The weight's codes are exact in int8, and there is one scale per row on either side.
    """
    count = 1 if isinstance(x, Matrix) else digit_count(precision)
    codes = x if isinstance(x, Matrix) else digit_matrix(x, precision)
    if isinstance(w, Matrix):  # int8 as it is stored
        return digits(codes, w, count)
    parts = [
        Matrix(codes.codes[:, :, i :: w.planes], codes.scale, codes.zero_point, codes.qtype) for i in range(w.planes)
    ]

    def multiply(block: Matrix | Packed, b: Any, _: Any) -> jax.Array:
        def unpacked() -> list[jax.Array]:
            return [plane.codes for plane in block.int8()]

        codes = in_branch(block.stored, unpacked) if block.planes == 1 else lax.optimization_barrier(unpacked())
        planes = [Matrix(c, p.scale, p.zero_point, p.qtype) for c, p in zip(codes, block.int8(), strict=True)]
        rows = [part.block(b, block.shape[0], 0, part.shape[1]) for part in parts]
        return total(digits(x, plane, count) for x, plane in zip(rows, planes, strict=True))

    return by_blocks(x if isinstance(x, jax.Array) else x.codes, w, multiply, 4 * LARGEST)


def float_blocks(x: jax.Array, w: Matrix | Packed, precision: lax.PrecisionLike) -> jax.Array:
    """The product with the real values, [B, M, K] x [B, N, K] -> [B, M, N], in x's dtype, with sums in float32.

    Up to 128 rows the weight goes left, where XLA's CPU library reads it fastest; one row is off its path and is padded
    to two. With more rows arithmetic counts, and the activation goes left. The barriers keep the decoded block in one
    piece (or it would be decoded once per use) and the weight on its side.
    """
    rows, columns = x.shape[1], w.shape[1]
    many, padded = number(rows) > _FEW_ROWS, _two_rows(x)
    parts = [padded[:, :, i :: w.planes] for i in range(w.planes)]

    def multiply(block: Matrix | Packed, b: Any, _: Any) -> jax.Array:
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
        return scaled(out, None, scale)

    return by_blocks(x, w, multiply, LARGEST if many else 2 * LARGEST)


def _decoded(block: Matrix | Packed, dtype: Any) -> tuple[list[jax.Array], jax.Array | None]:
    """Values in planes, and the scales that are left for the sums, or None.

    Codes that cross bytes and scales in fp8 are decoded on their own; fused, they are slow.
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


def in_branch(about: jax.Array, compute: Callable[[], Any]) -> Any:
    """``compute()`` out of a branch taken by an array: XLA's CPU backend fuses nothing into what comes out of one."""
    return lax.cond(about[(0,) * about.ndim] == 0, compute, compute)


def _two_rows(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))) if x.shape[1] == 1 else x


def total(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays."""
    first, *others = parts
    for other in others:
        first = first + other
    return first


def by_blocks(
    x: jax.Array, w: Matrix | Packed, multiply: Callable[[Any, Any, Any], jax.Array], largest: int = LARGEST
) -> jax.Array:
    """``multiply`` of every block, its first matrix and its first row, [nb, M, nr] each, as [B, M, N].

    Blocks have one size, of ``largest`` elements at most; the last along an axis starts early, and computes some
    columns a second time. A weight with a size that is a symbol is one block.
    """
    b, n, k = w.shape
    if math.inf in map(number, w.shape):
        return multiply(w.block(0, b, 0, n), 0, 0)
    elements = min(max(b * n * k // BLOCKS, SMALLEST), largest)
    nr = _block_size(n, max(elements // k, 1), 16)
    nb = _block_size(b, max(elements // (n * k), 1), 1)
    steps = (-(-b // nb), -(-n // nr))
    if steps == (1, 1):
        return multiply(w.block(0, b, 0, n), 0, 0)
    # Zeros that vary over devices as the operands do.
    zeros = (x[:, :, :1] * 0).astype(jnp.float32) + jnp.swapaxes(w.stored[:, :, :1] * 0, 1, 2).astype(jnp.float32)

    def step(i: Any, out: jax.Array) -> jax.Array:
        at_b, at_r = jnp.minimum(i // steps[1] * nb, b - nb), jnp.minimum(i % steps[1] * nr, n - nr)
        return lax.dynamic_update_slice(out, multiply(w.block(at_b, nb, at_r, nr), at_b, at_r), (at_b, 0, at_r))

    return lax.fori_loop(0, steps[0] * steps[1], step, zeros)


def _block_size(size: int, most: int, multiple: int) -> int:
    """A block of at most about ``most``, so that few blocks of equal size cover ``size`` with little overlap."""
    if size <= most:
        return size
    block = -(-size // -(-size // most))
    return min(-(-block // multiple) * multiple, size)
