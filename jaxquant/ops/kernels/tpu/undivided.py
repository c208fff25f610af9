"""Kernels where a program has its arrays whole: on one device, or in a `jax.shard_map` over all axes of a mesh.

XLA divides what it knows over several devices, and refuses to divide kernels. So which function runs is only chosen
when a program is lowered, and it is known how many devices it is for: the other function is one that XLA divides, with
no weight gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ["if_undivided"]

Function = Callable[..., jax.Array]

_choice_p = Primitive("if_undivided")


def if_undivided(kernel: Function, divided: Function, *arrays: jax.Array) -> jax.Array:
    """``kernel(*arrays)`` on one device, ``divided(*arrays)`` in a program that XLA divides over several."""
    (shape,) = jax.make_jaxpr(divided)(*arrays).out_avals
    return _choice_p.bind(*_varying_alike(arrays), kernel=kernel, divided=divided, shape=shape)


def _varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that vary over the same axes of a `jax.shard_map`, as the arguments of a kernel must."""
    over = [
        getattr(getattr(t, "manual_axis_type", t), "varying", getattr(t, "vma", frozenset()))
        for t in map(jax.typeof, arrays)
    ]
    every = frozenset().union(*over)
    cast: Any = getattr(lax, "pcast", None)

    def one(x: jax.Array, has: frozenset[Any]) -> jax.Array:
        missing = tuple(every - has)
        if not missing:
            return x
        return lax.pvary(x, missing) if cast is None else cast(x, missing, to="varying")

    return [one(x, has) for x, has in zip(arrays, over, strict=True)]


@_choice_p.def_abstract_eval
def _shape(*arrays: Any, kernel: Function, divided: Function, shape: Any) -> Any:
    del arrays, kernel, divided
    return shape


@_choice_p.def_impl
def _run(*arrays: Any, kernel: Function, divided: Function, shape: Any) -> Any:
    return jax.jit(lambda *arrays: _choice_p.bind(*arrays, kernel=kernel, divided=divided, shape=shape))(*arrays)


def _batch(arrays: Any, axes: Any, *, kernel: Function, divided: Function, shape: Any) -> tuple[Any, int]:
    del shape
    one, other = (functools.partial(_mapped, fn, tuple(axes)) for fn in (kernel, divided))
    return if_undivided(one, other, *arrays), 0


def _mapped(fn: Function, axes: tuple[int | None, ...], *arrays: jax.Array) -> jax.Array:
    return jax.vmap(fn, axes)(*arrays)


def _lower(ctx: Any, *arrays: Any, kernel: Function, divided: Function, shape: Any) -> Any:
    del shape
    where = ctx.module_context.axis_context
    manual = getattr(where, "manual_axes", frozenset())
    alone = where.num_devices == 1 if hasattr(where, "num_devices") else set(manual) == set(where.mesh.axis_names)
    return mlir.lower_fun(kernel if alone else divided, multiple_results=False)(ctx, *arrays)


batching.primitive_batchers[_choice_p] = _batch
mlir.register_lowering(_choice_p, _lower)
