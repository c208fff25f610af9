"""Pallas' Triton dialect, as older versions of JAX have it too."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

__all__ = ["load", "params", "store"]

_PARAMS: Any = getattr(triton, "CompilerParams", None) or getattr(triton, "TritonCompilerParams")  # noqa: B009


def params(warps: int, stages: int) -> Any:
    """What the compiler is told."""
    return _PARAMS(num_warps=warps, num_stages=stages)


def load(ref: Any, index: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """Elements at indices that are broadcast together; 0 where the mask is False."""
    if mask is None:
        return ref[index]
    if hasattr(triton, "load"):
        return triton.load(ref.at[index], mask=mask, other=0)
    return pl.load(ref, index, mask=mask, other=0)  # pyright: ignore[reportAttributeAccessIssue]


def store(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array | None) -> None:
    """Writes elements at indices where the mask is True, or all."""
    if mask is None:
        ref[index] = value
    elif hasattr(triton, "store"):
        triton.store(ref.at[index], value, mask=mask)
    else:
        pl.store(ref, index, value, mask=mask)  # pyright: ignore[reportAttributeAccessIssue]
