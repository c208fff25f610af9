"""Runs a kernel where a program has whole arrays: on one device, or in a `jax.shard_map` over all axes of a mesh.

XLA partitions its own operations over several devices, but not kernels. So the choice is made when a program is lowered
and the number of devices is known: on several devices another function runs, which XLA partitions without gathering a
weight.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxquant.core.by_platform import run_program
from jaxquant.core.types import PyTree
from jaxquant.ops.problem import Problem

__all__ = ["if_undivided", "run_undivided"]

Function = Callable[..., PyTree]
_Shapes = tuple[ShapedArray, ...]

_choice_p = Primitive("if_undivided")
_choice_p.multiple_results = True


def if_undivided(kernel: Function, divided: Function, *arrays: jax.Array) -> PyTree:
    """``kernel(*arrays)`` on one device, ``divided(*arrays)`` in a program that XLA partitions over several."""
    jaxpr, shape = jax.make_jaxpr(divided, return_shape=True)(*arrays)
    kernel, divided = (functools.partial(_leaves, fn) for fn in (kernel, divided))
    found = _choice_p.bind(*_varying_alike(arrays), kernel=kernel, divided=divided, shapes=tuple(jaxpr.out_avals))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def run_undivided(problem: Problem, kernel: Function, divided: Function) -> jax.Array:
    """`if_undivided` for functions of a problem, a pytree with the dtype of its ``result``."""
    leaves, tree = jax.tree.flatten(problem)
    result = problem.result  # the equation keeps its functions, and all that they close over: no arrays

    def of(run: Function) -> Function:
        return lambda *leaves: run(jax.tree.unflatten(tree, leaves)).astype(result)

    return if_undivided(of(kernel), of(divided), *leaves)


def _leaves(fn: Function, *arrays: jax.Array) -> list[jax.Array]:
    return jax.tree.leaves(fn(*arrays))


def _varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that vary over the same axes of a `jax.shard_map`, as the arguments of a kernel must."""
    over = [
        getattr(getattr(t, "manual_axis_type", t), "varying", getattr(t, "vma", frozenset()))
        for t in map(jax.typeof, arrays)
    ]
    every = frozenset().union(*over)
    cast: Any = getattr(lax, "pcast", None)

    def one(x: jax.Array, has: frozenset[str]) -> jax.Array:
        missing = tuple(every - has)
        if not missing:
            return x
        return getattr(lax, "pvary")(x, missing) if cast is None else cast(x, missing, to="varying")  # noqa: B009

    return [one(x, has) for x, has in zip(arrays, over, strict=True)]


@_choice_p.def_abstract_eval
def _shapes(*arrays: ShapedArray, kernel: Function, divided: Function, shapes: _Shapes) -> _Shapes:
    del arrays, kernel, divided
    return shapes


@_choice_p.def_impl
def _run(*arrays: jax.Array, **how: Any) -> list[jax.Array]:
    return run_program(
        lambda: jax.jit(lambda *arrays: _choice_p.bind(*arrays, **how))(*arrays), lambda: how["divided"](*arrays)
    )


def _batch(
    arrays: Sequence[jax.Array], axes: Sequence[int | None], *, kernel: Function, divided: Function, shapes: _Shapes
) -> tuple[list[jax.Array], tuple[int, ...]]:
    one, other = (functools.partial(_mapped, fn, tuple(axes)) for fn in (kernel, divided))
    return if_undivided(one, other, *arrays), (0,) * len(shapes)


def _mapped(fn: Function, axes: tuple[int | None, ...], *arrays: jax.Array) -> list[jax.Array]:
    return jax.vmap(fn, axes)(*arrays)


def _lower(ctx: mlir.LoweringRuleContext, *arrays: Any, kernel: Function, divided: Function, shapes: _Shapes) -> Any:
    del shapes
    where: Any = ctx.module_context.axis_context
    manual = getattr(where, "manual_axes", frozenset())
    alone = where.num_devices == 1 if hasattr(where, "num_devices") else set(manual) == set(where.mesh.axis_names)
    with _in_32_bits() if alone else contextlib.nullcontext():
        return mlir.lower_fun(kernel if alone else divided, multiple_results=True)(ctx, *arrays)


def _in_32_bits() -> contextlib.AbstractContextManager[None]:
    """Where JAX has 64 bits, Pallas' indices have them for a TPU too, which its compiler refuses."""
    return jax.enable_x64(False) if hasattr(jax, "enable_x64") else getattr(jax.experimental, "disable_x64")()  # noqa: B009


batching.primitive_batchers[_choice_p] = _batch
mlir.register_lowering(_choice_p, _lower)
