"""Converts the layouts of files to those of a `QTensor`: bit streams, and the blocks of scales.

A QTensor's packed codes are a little-endian bit stream along the last axis. Formats that pack the same way into larger
words are copied byte by byte; other formats are unpacked to one code per byte, one tensor at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np

from jaxquant.core.packing import packed_length
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QTYPES
from jaxquant.io.bits import packed, unpacked

__all__ = [
    "E2M1",
    "TABLES",
    "Grouping",
    "aligned",
    "block_size",
    "flat_blocks",
    "grouping",
    "in_blocks",
    "in_unstated_blocks",
    "index_of_blocks",
    "qtensor",
    "refined",
    "spread",
]


def qtensor(
    stream: np.ndarray,
    scale: np.ndarray | QTensor,
    *,
    bits: int,
    length: int,
    dtype: np.dtype,
    zero_point: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    permutation: np.ndarray | None = None,
    minor: tuple[int, ...] = (),
    signed: bool = False,
) -> QTensor:
    """A QTensor of integers from a bit stream [..., bytes] of unsigned patterns.

    ``signed`` means offset binary: the pattern is the code plus ``2**(bits - 1)``.
    """
    stream = stream[..., : packed_length(length, bits)]
    if bits == 8:
        codes = (stream ^ np.uint8(128)).view(np.int8) if signed else stream
        return QTensor(
            codes, scale, zero_point, offset, permutation, qtype="int8" if signed else "uint8", dtype=dtype, minor=minor
        )
    name = f"{'' if signed else 'u'}int{bits}"
    return QTensor(stream, scale, zero_point, offset, permutation, qtype=name, dtype=dtype, minor=minor, length=length)


# -- blocks ------------------------------------------------------------------------------------------------------------


def index_of_blocks(length: int, block: int) -> np.ndarray:
    """For each block of gcd(block, length) elements, the index of the block of ``block`` elements that contains it."""
    block = min(block, length)
    return np.arange(0, length, math.gcd(block, length)) // block


def block_size(length: int, count: int) -> int | None:
    """Elements of each of ``count`` blocks along ``length``, if the shapes determine it; otherwise None.

    Blocks are equal parts, or powers of two of which the last may be short. Both may be possible: 192 in two blocks is
    96 and 96, or 128 and 64.
    """
    if count < 1 or length % count:
        return None
    equal = length // count
    power = 1 << (equal - 1).bit_length()  # the least power of two that is at least the equal part
    return None if power != equal and count > 1 and -(-length // power) == count else equal


def refined(values: np.ndarray, length: int, block: int, axis: int = -1) -> np.ndarray:
    """Repeats values per block, of which the last may be short, for smaller blocks that divide ``length`` exactly."""
    return values if length % block == 0 else np.take(values, index_of_blocks(length, block), axis)


def flat_blocks(shape: tuple[int, ...], block: int) -> np.ndarray:
    """For blocks over the flattened array: the index of the block of each run along the last axis.

    Runs have gcd(block, shape[-1]) elements, so that no run straddles two blocks.
    """
    block = min(block, math.prod(shape))
    step = math.gcd(block, shape[-1])
    return (np.arange(0, math.prod(shape), step) // block).reshape(*shape[:-1], shape[-1] // step)


def aligned(values: np.ndarray, shape: tuple[int, ...], *, out_first: bool = True) -> np.ndarray | None:
    """Per-block values with one axis for each axis of the weight; None if their axes are ambiguous.

    Missing axes are the last ones, and have one block: [out] or [out, 1] for a kernel [out, in, 3, 3], [experts] for
    [experts, out, in].

    Args:
      values: one entry per block.
      shape: the shape of the weight.
      out_first: whether the weight is [.., out, in]. Experts may be [experts, in, out]; the second axis of [experts,
        out] then belongs to the axis of the same length, and is ambiguous if both axes have it.
    """
    if values.size == 1:
        return values.reshape((1,) * len(shape))
    if values.ndim > len(shape):
        values = values.reshape([n for n in values.shape if n != 1])
    if values.ndim == len(shape):
        return values
    if values.ndim > len(shape) or any(n not in (1, m) for n, m in zip(values.shape[:-1], shape, strict=False)):
        return None
    at, n = values.ndim - 1, values.shape[-1]
    if not out_first and at and n != 1:
        axes = [axis for axis in range(at, len(shape)) if shape[axis] == n]
        if len(axes) != 1:
            return None
        at = axes[0]
    elif len(shape) > 2 and n not in (1, shape[at]):
        return None
    return values.reshape(*values.shape[:-1], *(n if axis == at else 1 for axis in range(values.ndim - 1, len(shape))))


def spread(values: np.ndarray, shape: tuple[int, ...], block: tuple[int | None, ...]) -> np.ndarray | None:
    """Per-block values for an array of ``shape``; None if their shape does not fit ``block``.

    Args:
      values: one entry per block along each axis.
      shape: the shape of the array.
      block: elements of a block along each axis; None: determined by `block_size`.
    """
    if len(values.shape) != len(shape):
        return None
    for axis, (n, size) in enumerate(zip(shape, block, strict=True)):
        count = values.shape[axis]
        size = block_size(n, count) if size is None else size
        if size is None or count != -(-n // size):
            return None
        values = refined(values, n, size, axis)
    return values


def in_blocks(values: np.ndarray, shape: tuple[int, ...], sizes: Iterable[tuple[int, int]]) -> np.ndarray | None:
    """Values of blocks of the last two axes, as by `spread`; None unless exactly one of these sizes fits.

    An axis may also have one value, or one value per element.
    """
    found: dict[tuple[int | None, ...], np.ndarray] = {}
    for size in sizes:
        block: list[int | None] = [None] * len(shape)
        for axis, n in zip((-2, -1), size, strict=True):
            if values.shape[axis] not in (1, shape[axis]):
                block[axis] = n
        counts = [-(-n // b) if b else m for n, m, b in zip(shape, values.shape, block, strict=True)]
        stacked = all(m in (1, n) for n, m in zip(shape[:-2], values.shape, strict=False))
        if stacked and tuple(counts) == values.shape and (one := spread(values, shape, tuple(block))) is not None:
            found[tuple(block)] = one
    return next(iter(found.values())) if len(found) == 1 else None


def in_unstated_blocks(values: np.ndarray, shape: tuple[int, ...], usual: Sequence[int]) -> np.ndarray | None:
    """Values of blocks of an unstated size, as by `spread`; None if the shapes do not determine the size.

    Args:
      values: one entry per block.
      shape: the shape of the weight.
      usual: the usual sizes of such blocks, of which the last may be short. Blocks of other sizes are equal parts, or
        powers of two if they give the same number of blocks.
    """
    sizes = []
    for n, count in zip(shape[-2:], values.shape[-2:], strict=True):
        equal = n // count
        sizes.append({*usual, equal, 1 << (equal - 1).bit_length()} if n % count == 0 else {*usual})
    return in_blocks(values, shape, itertools.product(*sizes))


class Grouping:
    """The order of columns that makes the groups of act-order consecutive blocks.

    Attributes:
      order: stored position -> column, or None if groups are consecutive already.
      index: the group of each block of equal length.
    """

    def __init__(self, order: np.ndarray | None, index: np.ndarray):
        self.order, self.index = order, index

    @property
    def permutation(self) -> np.ndarray | None:
        """The `QTensor` field, for a weight [out, in]."""
        return None if self.order is None else self.order[None].astype(np.int32)

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Expands values [out, groups] to values of blocks."""
        if len(self.index) == values.shape[1] and (self.index == np.arange(len(self.index))).all():
            return values
        return np.take(values, self.index, 1)

    def stream(self, stream: np.ndarray, bits: int, length: int) -> np.ndarray:
        """A bit stream [out, bytes] with its columns in the stored order."""
        if self.order is None:
            return stream
        return packed(unpacked(stream, bits, length)[:, self.order], bits)


def grouping(groups: np.ndarray) -> Grouping:
    """The grouping for the group index of each column."""
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    block = math.gcd(*counts[counts > 0].tolist()) or 1
    index = groups[order][::block]
    return Grouping(None if (order == np.arange(len(order))).all() else order, index)


#: The exact float32 values of nf4, fp4 and the dynamic map in files.
TABLES = {name: np.asarray(QTYPES[name].table, np.float32) for name in ("nf4", "fp4", "dynamic8")}
#: Magnitudes of e2m1.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
