"""Decodes a weight a block of rows at a time, so that it is never decoded as a whole.

A loop over blocks of rows unpacks a block into a temporary that stays in the cache, multiplies it, and writes its
columns of the result. Only the stored weight is read from memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number
from jaxquant.core.types import Index
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["BLOCKS", "LARGEST", "SMALLEST", "by_blocks", "in_branch", "rows_of", "slice_of", "sum_of_parts", "total"]

T = TypeVar("T")

BLOCKS, SMALLEST, LARGEST = 16, 1 << 16, 1 << 19
"""Bounds of a block in elements, at most 2 MiB in float32; within them a block is a sixteenth of the weight.

Blocks are twice as large with few rows, which several cores share better, and four times as large in int8.
"""

AMatrix = TypeVar("AMatrix", bound=Matrix | Packed)


def rows_of(x: AMatrix, b: Index, nb: int, r: Index, nr: int) -> AMatrix:
    """``nb`` matrices from ``b`` (which may be traced) and ``nr`` rows of each from ``r``, in all arrays of ``x``.

    Size-1 axes broadcast.
    """

    def cut(name: str, value: jax.Array) -> jax.Array:
        if name == "codes" and jnp.issubdtype(value.dtype, jnp.floating):
            # XLA's CPU backend would widen the array to slice it, or copy it outside the loop over blocks. So slice the
            # bit patterns, which are the stored form.
            value = lax.optimization_barrier((lax.bitcast_convert_type(value, jnp.uint8), b, r))[0]
        for axis, (start, size) in enumerate(((b, nb), (r, nr))):
            value = slice_of(value, start, size, axis)
        return value

    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    cuts = {name: cut(name, value) for name, value in fields.items() if isinstance(value, jax.Array)}
    return dataclasses.replace(x, **cuts)


def slice_of(value: jax.Array, start: Index, size: int, axis: int) -> jax.Array:
    """A slice of an axis; a size-1 axis broadcasts, so it stays whole."""
    return value if value.shape[axis] in (1, size) else lax.dynamic_slice_in_dim(value, start, size, axis)


def in_branch(about: jax.Array, compute: Callable[[], T]) -> T:
    """Runs ``compute()`` in a branch on an array, since XLA's CPU backend does not fuse across branches."""
    return lax.cond(about[(0,) * about.ndim] == 0, compute, compute)


def total(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays."""
    first, *others = parts
    for other in others:
        first = first + other
    return first


def sum_of_parts(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Splits x into ``count`` parts along an axis and adds them: XLA fuses this, but not a reduction."""
    return total(jnp.split(x, count, axis))


def by_blocks(
    x: jax.Array,
    w: Matrix | Packed,
    multiply: Callable[[Matrix | Packed, Index, Index], jax.Array],
    largest: int = LARGEST,
) -> jax.Array:
    """Calls ``multiply(block, first_matrix, first_row)``, which returns [nb, M, nr], for each block; [B, M, N].

    All blocks have the same size, of ``largest`` elements at most; the last block along an axis starts early, and
    computes some columns twice. A weight with a symbolic size is one block.
    """
    b, n, k = w.shape
    if math.inf in map(number, w.shape):
        return multiply(rows_of(w, 0, b, 0, n), 0, 0)
    elements = min(max(b * n * k // BLOCKS, SMALLEST), largest)
    nr = _block_size(n, max(elements // k, 1), 16)
    nb = _block_size(b, max(elements // (n * k), 1), 1)
    steps = (-(-b // nb), -(-n // nr))
    if steps == (1, 1):
        return multiply(rows_of(w, 0, b, 0, n), 0, 0)
    # Zeros that vary over devices as the operands do.
    zeros = (x[:, :, :1] * 0).astype(jnp.float32) + jnp.swapaxes(w.stored[:, :, :1] * 0, 1, 2).astype(jnp.float32)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        at_b, at_r = jnp.minimum(i // steps[1] * nb, b - nb), jnp.minimum(i % steps[1] * nr, n - nr)
        return lax.dynamic_update_slice(out, multiply(rows_of(w, at_b, nb, at_r, nr), at_b, at_r), (at_b, 0, at_r))

    return lax.fori_loop(0, steps[0] * steps[1], step, zeros)


def _block_size(size: int, most: int, multiple: int) -> int:
    """The size of equal blocks, about ``most`` at most, that cover ``size`` with little overlap."""
    if size <= most:
        return size
    block = -(-size // -(-size // most))
    return min(-(-block // multiple) * multiple, size)
