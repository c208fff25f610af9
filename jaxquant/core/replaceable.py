"""Functions that have another implementation on some platforms.

This level knows no platform: it says what is computed, plainly. `jaxquant.ops.kernels` replaces what a compiler is slow
at, for that compiler alone, by the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import lax

__all__ = ["Replaceable"]


class Replaceable:
    """A pure function of positional arrays and static keywords; a decorator.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant.core.replaceable import Replaceable
      >>> @Replaceable
      ... def double(x):
      ...     return x + x
      >>> @double.on("tpu")
      ... def shifted(x):
      ...     return x << 1
      >>> double(jnp.int32(3))
      Array(6, dtype=int32)
    """

    def __init__(self, plain: Callable[..., Any]):
        self._plain = plain
        self._own: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {}
        functools.update_wrapper(self, plain)

    def on(self, platform: str, when: Callable[..., bool] = lambda *_, **__: True) -> Callable[[Any], Any]:
        """A decorator: what is computed in a program for a platform, ``when`` that is true of the arguments."""

        def register(own: Callable[..., Any]) -> Callable[..., Any]:
            self._own[platform] = own, when
            return own

        return register

    @property
    def plainly(self) -> Callable[..., Any]:
        """The function as it was written."""
        return self._plain

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        """The value, as the platform that the program is lowered for computes it."""
        own = {
            platform: functools.partial(fn, **static)
            for platform, (fn, when) in self._own.items()
            if when(*arrays, **static)
        }
        plain = functools.partial(self._plain, **static)
        return lax.platform_dependent(*arrays, **own, default=plain) if own else plain(*arrays)
