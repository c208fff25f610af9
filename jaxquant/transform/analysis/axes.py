"""An axis in pieces: how a reshape splits and merges them, and how to cut two descriptions of one axis alike.

An analysis describes each axis of a value by pieces, the outermost first, whose sizes multiply to the size of the axis.
Each analysis has its own type of piece. It passes a function that cuts one in two, ``(piece, outer) -> pieces``, the
first with ``outer`` entries. Pieces of size 1 are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = ["aligned", "factored", "size_of"]


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


P = TypeVar("P", bound=_Sized)
Cut = Callable[[P, int], tuple[P, P]]


def factored(
    dims: Iterable[Sequence[P]], shape: Iterable[int], cut: Cut[P], merged: Callable[[P, P], P]
) -> tuple[tuple[P, ...], ...]:
    """The pieces of each axis after a row-major reshape to a shape of as many elements, and not of none.

    ``merged`` makes one piece of two neighbours, where an axis ends inside both.
    """
    pieces = [piece for dim in dims for piece in dim if piece.size != 1]
    out = []
    for n in shape:
        dim: list[P] = []
        while n > 1:
            piece = pieces.pop(0)
            if n % piece.size == 0:
                dim.append(piece)
                n //= piece.size
            elif piece.size % n == 0:
                first, rest = cut(piece, n)
                dim.append(first)
                pieces.insert(0, rest)
                n = 1
            else:
                pieces[0] = merged(piece, pieces[0])
        out.append(tuple(dim))
    return tuple(out)


def aligned(a: Sequence[P], b: Sequence[P], cut: Cut[P]) -> list[tuple[P, P]] | None:
    """Two descriptions of one axis, cut at the same places; None if they cannot be."""
    left, right, out = list(a), list(b), []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size and x.size % y.size == 0:
            x, rest = cut(x, y.size)
            left.insert(0, rest)
        elif y.size > x.size and y.size % x.size == 0:
            y, rest = cut(y, x.size)
            right.insert(0, rest)
        elif x.size != y.size:
            return None
        out.append((x, y))
    return None if left or right else out


def size_of(dim: Sequence[_Sized]) -> int:
    """The size of an axis."""
    return math.prod(piece.size for piece in dim)
