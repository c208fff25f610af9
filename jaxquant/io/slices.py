"""Rows of large leaves, some at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxquant.core.paths import Leaf
from jaxquant.core.qtensor import QTensor

__all__ = ["rows", "runs_of_rows", "stored_by_rows"]

_SLICE = 1 << 16  # elements; their temporaries must be small compared to the memory of JAX and the interpreter


def stored_by_rows(leaf: Leaf) -> bool:
    """Whether the first axis of a leaf is stored first."""
    return bool(leaf.shape) and (not isinstance(leaf, QTensor) or leaf.stored_order[0] == 0)


def runs_of_rows(*leaves: Leaf) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive runs of rows of leaves of one shape; no run divides a block."""
    count, *rest = leaves[0].shape or (1,)
    together = math.lcm(*map(_rows_of_a_block, leaves))
    step = max(1, _SLICE // max(1, math.prod(rest) * together)) * together
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def rows(leaf: Any, begin: int, end: int) -> Any:
    """Rows of a leaf that is stored by rows; a leaf without axes is returned unchanged."""
    if not isinstance(leaf, QTensor):
        return leaf[begin:end] if leaf.shape else leaf

    def part(value: Any) -> Any:
        if value is None or value.shape[0] == 1:
            return value
        each = leaf.shape[0] // value.shape[0]
        return rows(value, begin // each, -(-end // each))

    fields = {name: part(getattr(leaf, name)) for name in ("scale", "zero_point", "offset", "permutation")}
    return leaf.replace(codes=leaf.codes[begin:end], **fields)


def _rows_of_a_block(leaf: Leaf) -> int:
    """The number of rows in a block."""
    if not isinstance(leaf, QTensor):
        return 1
    per_block = [value for value in (leaf.scale, leaf.zero_point, leaf.offset) if value is not None]
    sizes = [(leaf.shape[0] // value.shape[0], value) for value in per_block if value.shape[0] > 1]
    return math.lcm(*(n * _rows_of_a_block(value) for n, value in sizes))
