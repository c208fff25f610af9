"""Transposes, reshapes, slices and casts of a `QTensor`; values equal the same view of the float array.

Codes are never touched by a transpose or a cast. The others unpack codes narrower than a byte (to one per byte) and
move them; under ``jit`` that fuses into whatever reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.indices import clamped
from jaxquant.core.layout import minor_of
from jaxquant.core.qtensor import QTensor, Scale, flat, scale_values
from jaxquant.core.relayout import laid_out
from jaxquant.core.stack import Layer

__all__ = ["are_runs", "by_layer", "cast", "in_stored_order", "move", "reshape", "slice_along", "transpose"]


def cast(q: QTensor, dtype: DTypeLike) -> QTensor:
    """The same codes, dequantized to another float dtype."""
    return q.replace(dtype=np.dtype(dtype))


def transpose(q: QTensor, permutation: tuple[int, ...]) -> QTensor:
    """Permutes axes; codes do not move in memory, and a `Layer` stays in its stack."""
    place = {axis: i for i, axis in enumerate(permutation)}

    def per_block(value: Scale | None) -> Scale | None:
        if isinstance(value, QTensor):
            return transpose(value, permutation)
        return None if value is None else jnp.transpose(value, permutation)

    codes = q.kept
    if isinstance(codes, Layer):
        codes = Layer(transpose(codes.stack, (0, *(axis + 1 for axis in permutation))), codes.index)
    return q.replace(
        codes=codes,
        scale=per_block(q.scale),
        zero_point=per_block(q.zero_point),
        offset=per_block(q.offset),
        permutation=per_block(q.permutation),
        seal=per_block(q.seal),
        minor=minor_of(tuple(place[axis] for axis in q.stored_order)),
        split=None if q.split is None else place[q.ndim + q.split] - q.ndim,
    )


def in_stored_order(q: QTensor) -> QTensor:
    """The transpose whose axes are in the order in which codes are stored."""
    return transpose(q, q.stored_order) if q.minor else q


def _unpacked(q: QTensor, codes: jax.Array, *per_block: jax.Array | None) -> QTensor:
    """Codes one per element, with scale, zero point, offset and permutation."""
    found = QTensor(codes, *per_block, qtype=q.qtype, dtype=q.dtype)
    return found if q.seal is None else laid_out(found, "native")


def _per_block(q: QTensor, change: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array | None, ...]:
    """Scale, zero point and offset, changed."""
    values = (scale_values(q.scale), q.zero_point, flat(q.offset))
    return tuple(None if value is None else change(value) for value in values)


def _spread(value: jax.Array, shape: tuple[int, ...], axes: list[int]) -> jax.Array:
    """A per-block value with one entry per element along ``axes``."""
    for axis in axes:
        if value.shape[axis] not in (1, shape[axis]):
            value = jnp.repeat(value, shape[axis] // value.shape[axis], axis=axis)
    return value


def move(q: QTensor, change: Callable[[jax.Array], jax.Array], axes: tuple[int, ...]) -> QTensor:
    """Applies a function that moves elements along ``axes`` only (a flip, say) to codes and scales alike."""
    q, shape = q.unpermuted(), q.shape

    def blocks(value: jax.Array) -> jax.Array:
        value = _spread(value, shape, [a % q.ndim for a in axes])
        full = [n if i in axes else value.shape[i] for i, n in enumerate(shape)]
        moved = change(jnp.broadcast_to(value, full))
        keep = [slice(0, 1) if value.shape[i] == 1 else slice(None) for i in range(q.ndim)]
        return moved[tuple(keep)]

    return _unpacked(q, change(q.logical_codes()), *_per_block(q, blocks))


def slice_along(q: QTensor, axis: int, start: int | jax.Array, size: int) -> QTensor:
    """``size`` indices from ``start`` (which may be traced) along one axis; see `jaxquant.core.indices.clamped`."""
    n = q.shape[axis]
    if size == n:
        return q
    start = clamped(start, size, n)
    if q.permutation is not None and (axis % q.ndim == q.permuted_axis or q.permuted_axis != q.ndim - 1):
        q = q.unpermuted()

    def blocks(value: jax.Array) -> jax.Array:
        if value.shape[axis] == 1:
            return value
        block = n // value.shape[axis]
        whole = isinstance(start, int | np.integer) and start % block == 0 and size % block == 0
        if not whole:
            value, block = _spread(value, q.shape, [axis]), 1
        return lax.dynamic_slice_in_dim(value, start // block, size // block, axis)

    permutation = None if q.permutation is None else blocks(q.permutation)
    codes = lax.dynamic_slice_in_dim(q.logical_codes(), start, size, axis)
    return _unpacked(q, codes, *_per_block(q, blocks), permutation)


def by_layer(q: QTensor) -> QTensor:
    """The same values with the first axis first in every array, so that a scan can take its entries one by one."""
    n = q.shape[0]
    if q.ndim > 1 and q.stored_order[0] == 0 and all(leaf.shape[:1] == (n,) for leaf in jax.tree.leaves(q)):
        return q
    q = q.unpermuted()

    def blocks(value: jax.Array) -> jax.Array:
        value = _spread(value, q.shape, [0])
        return jnp.broadcast_to(value, (n, *value.shape[1:]))

    return _unpacked(q, q.logical_codes(), *_per_block(q, blocks))


def reshape(q: QTensor, shape: tuple[int, ...]) -> QTensor:
    """Another shape with the same elements in row-major order.

    Axes are matched in runs of equal size. Within a run, one shared scale stays shared, and one scale per element stays
    so. Blocks between these are kept if the new axes are cut on block boundaries; otherwise their scales are repeated
    for each element.
    """
    old = q.shape
    if old == tuple(shape):
        return q
    q, runs = q.unpermuted(), _runs(old, tuple(shape))

    def blocks(value: jax.Array) -> jax.Array:
        for before, after in runs:
            sizes = [value.shape[i] for i in before]
            if math.prod(sizes) == 1 or all(value.shape[i] == old[i] for i in before):
                continue
            whole = [old[i] for i in before]
            if are_runs(whole, sizes) and _blocks_of(math.prod(whole), math.prod(sizes), [shape[i] for i in after]):
                continue
            for i in before:
                if value.shape[i] != old[i]:
                    value = jnp.repeat(value, old[i] // value.shape[i], axis=i)
        new: list[int] = []
        for before, after in runs:
            count = math.prod(value.shape[i] for i in before)
            full = [shape[i] for i in after]
            if count == 1:
                new += [1] * len(after)
            elif count == math.prod(full):
                new += full
            else:
                found = _blocks_of(math.prod(full), count, full)
                assert found is not None
                new += found
        return value.reshape(new)

    return _unpacked(q, q.logical_codes().reshape(shape), *_per_block(q, blocks))


def are_runs(shape: Sequence[int], blocks: Sequence[int]) -> bool:
    """Whether blocks are runs of consecutive elements: one per index, then one axis in any blocks, then whole axes.

    Args:
      shape: sizes of axes.
      blocks: the number of blocks along each.
    """
    inner = len(blocks)
    while inner and blocks[inner - 1] == 1:
        inner -= 1
    return all(b == n for b, n in zip(blocks[: max(inner - 1, 0)], shape, strict=False))


def _blocks_of(total: int, count: int, sizes: list[int]) -> list[int] | None:
    """Blocks along each new axis if ``count`` equal runs of ``total`` elements end on the axes' boundaries."""
    left, out = total // count, list[int]()
    for n in reversed(sizes):
        if left >= n:
            if left % n:
                return None
            out.append(1)
            left //= n
        else:
            if n % left:
                return None
            out.append(n // left)
            left = 1
    return out[::-1]


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of old and new axes with equal products."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after, a, b = [], [], 1, 1
        if i < len(old):
            before, a, i = [i], old[i], i + 1
        if j < len(new) and (a != 1 or not before or new[j] == 1):
            after, b, j = [j], new[j], j + 1
        while a != b:
            if a < b:
                before.append(i)
                a, i = a * old[i], i + 1
            else:
                after.append(j)
                b, j = b * new[j], j + 1
        runs.append((before, after))
    return runs
