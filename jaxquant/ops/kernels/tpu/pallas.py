"""Arguments of Pallas calls for TPUs, whose names differ between versions of JAX."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

__all__ = ["LIMIT", "MEMORY", "compiler_params", "shape_like"]

MEMORY = 48 << 20
"""Bytes of a TPU's vector memory that the blocks of a program may take; the smallest has 64 MiB."""

LIMIT = MEMORY + (8 << 20)
"""The same and 8 MiB, which the compiler takes besides."""


def compiler_params(limit: int | None = None, *, order: tuple[str, ...] | None = None, interpret: bool = False) -> Any:
    """The compiler's parameters for a kernel; None for the interpreter.

    Args:
      limit: the bytes of memory that it may take; None is the compiler's own limit.
      order: for each axis of the grid ``"parallel"`` if its steps are independent, which a chip with two cores divides
        over them, or ``"arbitrary"``. By default all are in order, on one core.
      interpret: whether the interpreter runs it.
    """
    from jax.experimental.pallas import tpu as pltpu

    if interpret:
        return None
    params: Any = getattr(pltpu, "CompilerParams", None) or getattr(pltpu, "TPUCompilerParams")  # noqa: B009
    return params(vmem_limit_bytes=limit, dimension_semantics=order)


def shape_like(x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """A shape that varies over the same axes of a `jax.shard_map` as an array."""
    for name in ("manual_axis_type", "vma"):
        if hasattr(jax.typeof(x), name):
            how: dict[str, Any] = {name: getattr(jax.typeof(x), name)}
            return jax.ShapeDtypeStruct(shape, dtype, **how)
    return jax.ShapeDtypeStruct(shape, dtype)
