"""From granularity to blocks: which elements of an array share one scale.

A *block shape* has one entry per axis of the array: how many consecutive elements along that axis share a scale. The
scale keeps the array's rank, with ``shape[i] / block[i]`` entries along axis i, so it broadcasts after a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.granularity import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["BlockView", "block_shape", "group_error", "groups_fit", "negative_axes", "scale_shape", "spread"]

Array = TypeVar("Array", jax.Array, np.ndarray)


def negative_axes(axes: Sequence[int] | int, ndim: int, *, function: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sorted axes counted from the end, checked against ``ndim``."""
    given = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    axes = tuple(int(axis) if isinstance(axis, np.integer) else axis for axis in given)
    for axis in axes:
        if not isinstance(axis, int) or isinstance(axis, bool) or not -ndim <= axis < ndim:
            raise quant_error(
                function,
                f"reduce_axes must be axes of a {ndim}-dimensional array",
                todo=f"Use integers from {-ndim} to -1" if ndim else "Use ()",
                reduce_axes=axes,
                shape=shape,
            )
    normal = sorted(axis - ndim if axis >= 0 else axis for axis in axes)
    if len(set(normal)) != len(normal):
        raise quant_error(function, "reduce_axes repeats an axis", todo="Name each axis once", reduce_axes=axes)
    return tuple(normal)


def _group_block(
    shape: tuple[int, ...], axes: tuple[int, ...], group_size: int, function: str, path: str | None
) -> dict[int, int]:
    """Block sizes of the reduced axes when groups run along them in row-major order."""
    if groups_fit(shape, axes, group_size):
        block, left = dict[int, int](), group_size
        for axis in reversed(axes):
            block[axis] = min(left, shape[axis])
            left = max(left // shape[axis], 1)
        return block
    raise group_error(function, shape, axes, group_size, path=path)


def group_error(
    function: str,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    group_size: int,
    *,
    path: str | None,
    todo: str = "granularity=PerChannel()",
    fixed: bool = False,
) -> QuantError:
    """The error for groups that do not fit: names sizes that fit, unless the size is fixed, and the caller's remedy."""
    length = math.prod(shape[a] for a in axes)
    fitting = [d for d in range(2, length + 1) if length % d == 0 and groups_fit(shape, axes, d)]
    near = sorted(sorted(fitting, key=lambda d: abs(d - group_size))[:3])
    sizes = f"a group size such as {', '.join(map(str, near))}, or " if near not in ([], [length]) and not fixed else ""
    return quant_error(
        function,
        f"group_size must divide the length {length} of the reduced axes {axes} and end on an axis boundary",
        todo=f"Use {sizes}{todo}",
        path=path,
        group_size=group_size,
        shape=shape,
    )


def groups_fit(shape: tuple[int, ...], axes: tuple[int, ...], group_size: int) -> bool:
    """Whether groups of this size, along the axes in row-major order, all end where an axis does."""
    left = group_size
    for axis in reversed(axes):
        if left <= shape[axis]:
            return shape[axis] % left == 0
        if left % shape[axis]:
            return False
        left //= shape[axis]
    return left == 1


def block_shape(
    shape: tuple[int, ...],
    granularity: Granularity,
    reduce_axes: tuple[int, ...],
    *,
    function: str = "quantize",
    path: str | None = None,
) -> tuple[int, ...]:
    """The block shape of an array.

    Args:
      shape: the array's shape.
      granularity: `PerTensor`: one block; `PerChannel`: blocks span the reduced axes; `PerGroup`: ``size`` consecutive
        elements along the reduced axes, taken together in row-major order.
      reduce_axes: negative axes that share a scale.
      function, path: who asks, for the error message.

    Returns:
      One block size per axis; each divides that axis.
    """
    ndim = len(shape)
    match granularity:
        case PerTensor():
            return tuple(shape)
        case PerChannel():
            return tuple(shape[i] if i - ndim in reduce_axes else 1 for i in range(ndim))
        case PerGroup(size) if reduce_axes:
            group = _group_block(shape, reduce_axes, size, function, path)
            return tuple(group.get(i - ndim, 1) for i in range(ndim))
        case PerGroup():
            rule = "groups need at least one reduced axis to run along"
            todo = "Name the contracted axes in reduce_axes"
            raise quant_error(function, rule, todo=todo, path=path, reduce_axes=reduce_axes, shape=shape)


def scale_shape(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scale: blocks along each axis."""
    return tuple(n // b for n, b in zip(shape, block, strict=True))


class BlockView:
    """A reshape under which an array and its per-block values broadcast against each other.

    Axes whose blocks are neither whole nor single are split in two; `axes` are the axes of the view that one block
    spans.
    """

    def __init__(self, shape: tuple[int, ...], block: tuple[int, ...]):
        view, scale, axes = list[int](), list[int](), list[int]()
        for n, b in zip(shape, block, strict=True):
            if b in (1, n):
                view.append(n)
                scale.append(n // b)
                if b == n:
                    axes.append(len(view) - 1)
            else:
                view += [n // b, b]
                scale += [n // b, 1]
                axes.append(len(view) - 1)
        self.shape, self.block = tuple(shape), tuple(block)
        self.view_shape, self.scale_view_shape, self.axes = tuple(view), tuple(scale), tuple(axes)

    @classmethod
    def of_scale(cls, shape: tuple[int, ...], scale: tuple[int, ...]) -> BlockView:
        """The view of an array of ``shape`` whose scale has shape ``scale``."""
        return cls(shape, tuple(n // s for n, s in zip(shape, scale, strict=True)))

    def split(self, x: jax.Array) -> jax.Array:
        """The array, viewed."""
        return x.reshape(self.view_shape)

    def split_scale(self, scale: jax.Array) -> jax.Array:
        """A per-block value, shaped to broadcast against the view."""
        return scale.reshape(self.scale_view_shape)

    def split_reduced(self, value: jax.Array) -> jax.Array:
        """A value with size 1 along every axis that is cut into blocks, shaped likewise."""
        cut = (b not in (1, n) for n, b in zip(self.shape, self.block, strict=True))
        return value.reshape([s for n, c in zip(value.shape, cut, strict=True) for s in ((n, 1) if c else (n,))])

    def join(self, x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        return x.reshape(self.shape)

    def join_scale(self, scale: jax.Array) -> jax.Array:
        """Inverse of `split_scale`."""
        return scale.reshape(scale_shape(self.shape, self.block))


def spread(values: Array, shape: Sequence[int]) -> Array:
    """Values of blocks, each repeated over its block: to ``shape``, a multiple of their own along every axis."""
    for axis, n in enumerate(shape):
        if values.shape[axis] != n:
            values = values.repeat(n // values.shape[axis], axis)
    return values
