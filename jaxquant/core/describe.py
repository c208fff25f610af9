"""Which elements of an array share a scale, in words."""

from __future__ import annotations

import math

__all__ = ["granularity", "granularity_by_axes"]


def granularity(shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    """Of an array and its scale, from their shapes: ``"per channel"``, ``"groups of 64"``."""
    blocks = [n // s for n, s in zip(shape, scale, strict=True)]
    several = [b for b in blocks if b > 1]
    if math.prod(scale) == 1:
        return "per tensor"
    if all(b in (1, n) for b, n in zip(blocks, shape, strict=True)):
        return "per channel"
    return f"groups of {several[0]}" if len(several) == 1 else f"blocks of {' x '.join(map(str, several))}"


def granularity_by_axes(shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    """The same with the axes: ``"group 64 on axis -2"``."""
    ndim = len(shape)
    block = [n // s for n, s in zip(shape, scale, strict=True)]
    if any(1 < scale[i] < shape[i] for i in range(ndim)):
        groups = [i for i in range(ndim) if block[i] > 1]
        return f"group {' x '.join(str(block[i]) for i in groups)} on {_axes(groups, ndim)}"
    if math.prod(scale) == 1:
        return "per tensor"
    return f"per channel on {_axes([i for i in range(ndim) if scale[i] > 1], ndim)}"


def _axes(axes: list[int], ndim: int) -> str:
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(str(i - ndim) for i in axes)
