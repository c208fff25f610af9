"""Arguments of Pallas calls for TPUs, whose names differ between versions of JAX."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["MEMORY", "compiler_params", "shape_like"]

MEMORY = 48 << 20
"""Bytes of a TPU's vector memory that the blocks of a program may take; the smallest has 64 MiB."""


def compiler_params(limit: int = MEMORY + (8 << 20), *, interpret: bool = False) -> Any:
    """The bytes of memory that a kernel may take, as the compiler is told; None for the interpreter."""
    from jax.experimental.pallas import tpu as pltpu

    if interpret:
        return None
    params: Any = getattr(pltpu, "CompilerParams", None) or getattr(pltpu, "TPUCompilerParams")  # noqa: B009
    return params(vmem_limit_bytes=limit)


def shape_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape that varies over the same axes of a `jax.shard_map` as an array."""
    for name in ("manual_axis_type", "vma"):
        if hasattr(jax.typeof(x), name):
            how: dict[str, Any] = {name: getattr(jax.typeof(x), name)}
            return jax.ShapeDtypeStruct(shape, dtype, **how)
    return jax.ShapeDtypeStruct(shape, dtype)
