"""Products by weights of several input or output axes, as products of matrices, which the kernels compute.

A model's attention has weights [D, heads, size] and [heads, size, D]. Their axes are joined here where that copies no
codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxquant.core import views
from jaxquant.core.layout import block_rows
from jaxquant.core.qtensor import Operand, QTensor, Scale
from jaxquant.core.sizes import number
from jaxquant.core.stack import Layer
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.tpu.layout import side_by_side
from jaxquant.ops.problem import Product
from jaxquant.ops.trained import TrainedTensor, is_stored_in_elements

__all__ = ["as_matrices"]

_TILE = 64
"""Rows of a tile of 4-bit codes. Arrays are stored in tiles of their last two axes. Where whole tiles cover the last
but one, no tile is padded, and the axes before it are joined to it without a copy."""


def as_matrices(problem: Product) -> Product:
    """The same product by [K, N], as codes are stored, where that moves none. Its result has the axes of [M, N]."""
    if not is_stored_in_elements(problem.w):
        return problem
    problem = problem.in_stored_order()
    w, axes = problem.weight, problem.w_axes
    first, second = sorted((axes.rows, axes.contract))
    in_order = (*axes.batch, *first, *second) == tuple(range(len(axes.order))) and bool(first)
    contract, count = problem.x_axes.contract, len(axes.contract)
    joined = len(first) > 1 or len(second) > 1
    if not joined or not in_order or not _joins(w, len(first), len(second)):
        return problem
    if contract != tuple(range(contract[0], contract[0] + count)):
        return problem

    def moved(of: Sequence[int]) -> tuple[int, ...]:
        return tuple(i - (count - 1 if i > contract[0] else 0) for i in of)

    lead = len(axes.batch)
    rows, contracted = (lead, lead + 1) if first == axes.rows else (lead + 1, lead)
    return dataclasses.replace(
        problem,
        x=_joined(problem.x, contract),
        w=_matrix(w, lead, len(first)),
        x_axes=Axes(moved(problem.x_axes.batch), moved(problem.x_axes.rows), contract[:1]),
        w_axes=Axes(axes.batch, (rows,), (contracted,)),
    )


def _joins(w: QTensor, first: int, second: int) -> bool:
    """Whether the last ``second`` axes of a weight are joined without a copy of codes, and ``first`` axes before."""
    if math.inf in map(number, w.shape) or (w.split is not None and w.split >= -second):
        return False
    if (second > 1 and w.joined != second) or (first > 1 and w.shape[-second - 1] % _TILE):
        return False
    parts = slice(-second - first, -second), slice(w.ndim - second, w.ndim)
    return all(views.are_runs(w.shape[part], w.scale.shape[part]) for part in parts)


def _matrix(w: QTensor, lead: int, first: int) -> QTensor:
    """[..., K, N] of a weight with ``lead`` axes in front, ``first`` axes that make K, and others that make N."""

    def flat(shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:lead], math.prod(shape[lead : lead + first]), math.prod(shape[lead + first :]))

    def of_blocks(value: Scale | None) -> Scale | None:
        if value is None or value.shape == (shape := flat(value.shape)):
            return value  # the very object, which `QTensor.in_stack` looks for
        return views.reshape(value, shape) if isinstance(value, QTensor) else value.reshape(shape)

    (*_, k, _), (*_, groups, _) = flat(w.shape), flat(w.scale.shape)
    split = -2 if 1 < groups < k else None
    if isinstance(w.kept, Layer):
        codes: Any = Layer(_matrix(w.kept.stack, lead + 1, first), w.kept.index)
    else:
        blocks = (k,) if split is None else (-1, block_rows(k, groups))
        codes = w.kept.reshape(*w.kept.shape[:lead], *blocks, w.kept.shape[-1])
    scale, zero_point, offset, seal = map(of_blocks, (w.scale, w.zero_point, w.offset, w.seal))
    return QTensor(codes, scale, zero_point, offset, seal=seal, qtype=w.qtype, dtype=w.dtype, split=split)


def _joined(x: Operand, axes: tuple[int, ...]) -> Operand:
    """An activation with consecutive axes joined to the first of them."""
    if len(axes) == 1:
        return x
    shape = (*x.shape[: axes[0]], math.prod(x.shape[i] for i in axes), *x.shape[axes[-1] + 1 :])
    if isinstance(x, TrainedTensor):
        return TrainedTensor(views.reshape(x.frozen, shape), None)
    if isinstance(x, QTensor):
        return views.reshape(x, shape)
    return side_by_side(x, len(axes)) if axes[0] and axes[-1] == x.ndim - 1 else x.reshape(shape)
