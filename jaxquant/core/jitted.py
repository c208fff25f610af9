"""`jitted`: `jax.jit` as a decorator that keeps the type of its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

__all__ = ["jitted"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jitted(**options: Any) -> Callable[[_Function], _Function]:
    """A decorator: the function, compiled; within another trace it is inlined.

    Args:
      **options: of `jax.jit`.
    """

    def compiled(fn: _Function) -> _Function:
        return cast(_Function, jax.jit(fn, inline=True, **options))

    return compiled
