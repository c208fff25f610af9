"""From the layouts of files to those of a `QTensor`: bit streams, and which scale belongs to which block.

A QTensor's packed codes are a little-endian bit stream along the last axis. Formats that pack the same way into larger
words are taken over byte by byte; the others are unpacked to one code per byte, one tensor at a time.
"""

from __future__ import annotations

import math

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
    "block_size",
    "flat_blocks",
    "grouping",
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
    """For blocks of gcd(block, length) elements, in which block of ``block`` elements each one lies."""
    block = min(block, length)
    return np.arange(0, length, math.gcd(block, length)) // block


def block_size(length: int, count: int) -> int | None:
    """Elements of each of ``count`` blocks along ``length``, where the shapes leave no doubt.

    Blocks are equal parts or powers of two, the last one short. None if the parts are not equal, or if a power of two
    gives as many: 192 in two blocks are 96 and 96, or 128 and 64.
    """
    if count < 1 or length % count:
        return None
    equal = length // count
    power = 1 << (equal - 1).bit_length()  # the least that is not below equal parts
    return None if power != equal and count > 1 and -(-length // power) == count else equal


def refined(values: np.ndarray, length: int, block: int, axis: int = -1) -> np.ndarray:
    """Per-block values, the last block being short, as values of blocks that divide ``length`` exactly."""
    return values if length % block == 0 else np.take(values, index_of_blocks(length, block), axis)


def flat_blocks(shape: tuple[int, ...], block: int) -> np.ndarray:
    """For blocks that run over the flattened array: the number of the block of each run along the last axis.

    The runs are gcd(block, shape[-1]) long, so that none of them straddles a block.
    """
    block = min(block, math.prod(shape))
    step = math.gcd(block, shape[-1])
    return (np.arange(0, math.prod(shape), step) // block).reshape(*shape[:-1], shape[-1] // step)


def spread(values: np.ndarray, shape: tuple[int, ...], block: tuple[int | None, ...]) -> np.ndarray | None:
    """Per-block values for an array of ``shape``; None if their shape does not fit ``block``.

    Args:
      values: one entry per block along each axis.
      shape: the shape of the array.
      block: elements of a block along each axis; None: by `block_size`.
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


class Grouping:
    """How the groups of act-order become consecutive blocks.

    Attributes:
      order: stored position -> column, or None where groups are consecutive already.
      index: the group of each block of equal length.
    """

    def __init__(self, order: np.ndarray | None, index: np.ndarray):
        self.order, self.index = order, index

    @property
    def permutation(self) -> np.ndarray | None:
        """The `QTensor` field, for a weight [out, in]."""
        return None if self.order is None else self.order[None].astype(np.int32)

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Values [out, groups] as values of blocks."""
        if len(self.index) == values.shape[1] and (self.index == np.arange(len(self.index))).all():
            return values
        return np.take(values, self.index, 1)

    def stream(self, stream: np.ndarray, bits: int, length: int) -> np.ndarray:
        """A bit stream [out, bytes] in the stored order."""
        if self.order is None:
            return stream
        return packed(unpacked(stream, bits, length)[:, self.order], bits)


def grouping(groups: np.ndarray) -> Grouping:
    """From the group of each column."""
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    block = math.gcd(*counts[counts > 0].tolist()) or 1
    index = groups[order][::block]
    return Grouping(None if (order == np.arange(len(order))).all() else order, index)


#: The exact float32 values of nf4, fp4 and the dynamic map, as files hold them.
TABLES = {name: np.asarray(QTYPES[name].table, np.float32) for name in ("nf4", "fp4", "dynamic8")}
#: Magnitudes of e2m1.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
