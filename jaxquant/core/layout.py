"""How codes lie in memory: the order of their axes, their dtype, their blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.qtypes import QTYPES
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.types import Shaped

__all__ = [
    "Layout",
    "block_rows",
    "inverse",
    "minor_of",
    "nbytes_of",
    "own_dtype",
    "stored_order",
    "transpose",
    "viewed",
    "written_transposed",
]

Layout = Literal["packed", "elements", "native"]
"""How codes lie in memory; `jaxquant.core.relayout` stores them so.

- ``"packed"``, for CPUs and files: codes of fewer than 8 bits are packed into bytes along the last of the axes that are
  stored last.
- ``"elements"``, for GPUs: one code per element, in the array's own order, and in int4 up to 4 bits. An axis with
  groups is stored as two: blocks, and the elements of a block. A block is one group, or as many as make 128 elements.
  Codes of 8 bits without groups stay as they are.
- ``"native"``, for TPUs: as ``"elements"``, and codes of fp8 are in their own dtype, which a TPU's compiler converts
  within a product; bytes keep it from that. A TPU joins leading axes without a copy, and last axes with one. So last
  axes with scales of their own (heads) are stored as one; and 8-bit integers without groups, which otherwise stay, do
  not have several axes last that share a scale. Codes of 4 bits, in fp8 or in groups, [outputs, inputs], are stored
  transposed, since the kernels multiply [inputs, outputs]. Scales of fewer than 8 bits have a byte each, which kernels
  read.
"""


def block_rows(n: int, groups: int) -> int:
    """Elements of a block along an axis of n: 128 if that is a whole number of groups, else one.

    A TPU keeps 4-bit arrays in tiles of 64 rows by 128 columns; shorter blocks would be padded or copied when they are
    sliced, and a product sums fastest over 128 at a time.
    """
    group = n // groups
    return 128 if 128 % group == 0 and n % 128 == 0 else group


def nbytes_of(leaf: Shaped) -> int:
    """Bytes of an array, of 4-bit types two elements each."""
    size, dtype = math.prod(leaf.shape), np.dtype(leaf.dtype)
    return -(-size // 2) if dtype in (jnp.int4, jnp.uint4) else size * dtype.itemsize


@functools.cache
def own_dtype(qtype: object) -> np.dtype | None:
    """The dtype of fp8 codes; None for other types."""
    info = QTYPES.get(qtype) if isinstance(qtype, str) else None
    return info.code_dtype if info is not None and info.kind == "float" and not info.packed else None


def viewed(x: Any, old: np.dtype | None, new: np.dtype | None) -> Any:
    """An array (or its shape) viewed as another dtype of the same size; other objects are unchanged."""
    if old is None or new is None or getattr(x, "dtype", None) != old:
        return x
    if isinstance(x, np.ndarray):
        return cast(Any, x).view(new)
    if isinstance(x, jax.Array):
        return jax.lax.bitcast_convert_type(x, new)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, new, sharding=x.sharding)
    return x


@functools.cache
def stored_order(ndim: int, minor: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the logical array in the order in which codes are stored: the others, then ``minor``."""
    last = tuple(axis + ndim for axis in minor)
    return tuple(axis for axis in range(ndim) if axis not in last) + last


@functools.cache
def minor_of(order: tuple[int, ...]) -> tuple[int, ...]:
    """The ``minor`` with which axes are stored in this order: the fewest, so that one order has one name."""
    minors = (tuple(axis - len(order) for axis in order[i:]) for i in reversed(range(len(order) + 1)))
    return next(minor for minor in minors if stored_order(len(order), minor) == order)


@functools.cache
def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes another one."""
    return tuple(order.index(axis) for axis in range(len(order)))


def transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """`jnp.transpose`; emits no operation for the identity."""
    return x if tuple(order) == tuple(range(x.ndim)) else jnp.transpose(x, order)


@Replaceable
def written_transposed(x: jax.Array, *, order: tuple[int, ...]) -> jax.Array:
    """The transpose of an array, from memory to memory."""
    return transpose(x, order)
