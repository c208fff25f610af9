"""Pallas' Triton dialect, with one interface for older and newer versions of JAX."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from jaxquant.core import arithmetic
from jaxquant.core.types import PyTree

__all__ = ["alike", "divide", "load", "nearest", "params", "shaped", "store", "told"]

_PARAMS: Any = getattr(triton, "CompilerParams", None) or getattr(triton, "TritonCompilerParams")  # noqa: B009


def params(warps: int, stages: int) -> Any:
    """Compiler parameters."""
    return _PARAMS(num_warps=warps, num_stages=stages)


_KEEPS_METADATA = "metadata" in inspect.signature(pl.pallas_call).parameters


def told(operations: int, dtype: DTypeLike) -> dict[str, Any]:
    """Arguments of `pallas_call` by which readers of a compiled program know what the kernel multiplies.

    They are the operations of the float product, and the number type that the scheme multiplies. The program does not
    keep the cost estimate of a Triton kernel; an older JAX keeps no metadata either.
    """
    words = {"multiplied": str(jnp.dtype(dtype)), "operations": str(operations)}
    return {"metadata": words} if _KEEPS_METADATA else {}


def alike(arrays: PyTree) -> PyTree:
    """Arrays that vary over the same axes of a `jax.shard_map`: the union of the axes that they vary over."""
    over = frozenset().union(*map(_varying, jax.tree.leaves(arrays)))
    cast = getattr(lax, "pcast", None)

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(over - _varying(x))
        if not missing:
            return x
        return getattr(lax, "pvary")(x, missing) if cast is None else cast(x, missing, to="varying")  # noqa: B009

    return jax.tree.map(one, arrays)


def shaped(shape: tuple[int, ...], dtype: DTypeLike, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A result, which varies over the devices of a `jax.shard_map` as another array does."""
    aval, struct = jax.typeof(like), jax.ShapeDtypeStruct
    for name in ("manual_axis_type", "vma"):  # the newer and the older name
        if hasattr(aval, name):
            return struct(shape, dtype, **{name: getattr(aval, name)})
    return struct(shape, dtype)


def _varying(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else getattr(aval, "vma", frozenset())


def load(ref: jax.Ref, index: tuple[jax.Array, ...], mask: jax.Array | None) -> jax.Array:
    """Elements at indices that are broadcast together; 0 where the mask is False."""
    if mask is None:
        return ref[index]
    if hasattr(triton, "load"):
        return triton.load(ref.at[index], mask=mask, other=0)
    return pl.load(ref, index, mask=mask, other=0)  # pyright: ignore[reportAttributeAccessIssue]


def store(ref: jax.Ref, index: tuple[jax.Array, ...], value: jax.Array, mask: jax.Array | None) -> None:
    """Writes elements at indices where the mask is True, or all."""
    if mask is None:
        ref[index] = value
    elif hasattr(triton, "store"):
        triton.store(ref.at[index], value, mask=mask)
    else:
        pl.store(ref, index, value, mask=mask)  # pyright: ignore[reportAttributeAccessIssue]


def divide(x: jax.Array, y: jax.Array, *, interpret: bool) -> jax.Array:
    """``x / y`` in float32 for arrays of one shape, correctly rounded: Triton's own division is not."""
    return arithmetic.divide(x, y) if interpret else _machine("div.rn.f32 $0, $1, $2;", "=f,f,f", jnp.float32, x, y)


def nearest(x: jax.Array, *, interpret: bool) -> jax.Array:
    """The nearest int32 of a float32, half to even; 0 of NaN."""
    return jnp.rint(x).astype(jnp.int32) if interpret else _machine("cvt.rni.s32.f32 $0, $1;", "=r,f", jnp.int32, x)


def _machine(code: str, constraints: str, dtype: DTypeLike, *args: jax.Array) -> jax.Array:
    """One instruction for each element."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    how = {"constraints": constraints, "pack": 1, "result_shape_dtypes": [shape]}
    return triton.elementwise_inline_asm(code, args=args, **how)[0]
