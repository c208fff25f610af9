"""`jax.jit`: as a decorator that keeps the type of its function, and ahead of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.stages import Lowered, Wrapped

from jaxquant.core.types import PyTree

__all__ = ["executable", "jitted", "lowered"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jitted(**options: Any) -> Callable[[_Function], _Function]:
    """A decorator: the function, compiled; within another trace it is inlined.

    Args:
      **options: of `jax.jit`.
    """

    def compiled(fn: _Function) -> _Function:
        return cast(_Function, jax.jit(fn, inline=True, **options))

    return compiled


def lowered(fn: Wrapped, *args: PyTree) -> Lowered:
    """A function of `jax.jit`, lowered for these arguments: the same program under ``jax_disable_jit``.

    JAX would unroll its loops there.
    """
    with jax.disable_jit(False):
        return fn.lower(*args)


def executable(program: Lowered) -> Callable[..., PyTree]:
    """A program of `lowered`, compiled; it can be called under ``jax_disable_jit``, where JAX refuses to run it."""
    run = program.compile()

    def compiled(*args: PyTree) -> PyTree:
        with jax.disable_jit(False):
            return run(*args)

    return compiled
