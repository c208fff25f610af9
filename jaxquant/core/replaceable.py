"""Functions that have another implementation on some platforms.

This level knows no platform: it says what is computed, plainly. `jaxquant.ops.kernels` replaces what a compiler is slow
at, for that compiler alone, by the same values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from jaxquant.core.by_platform import Platform, Target, by_platform
from jaxquant.core.types import PyTree

__all__ = ["Replaceable"]

P = ParamSpec("P")
T = TypeVar("T")


class Replaceable(Generic[P, T]):
    """A pure function of positional arrays and static keywords; a decorator.

    Attributes:
      plainly: the function as it was written.

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

    def __init__(self, plain: Callable[P, T]):
        self.plainly = plain
        self._own: dict[str, tuple[Callable[P, T], Callable[P, bool]]] = {}
        functools.update_wrapper(self, plain)

    def on(
        self, platform: str, when: Callable[P, bool] = lambda *_, **__: True
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """A decorator: what is computed in a program for a platform, ``when`` that is true of the arguments."""

        def register(own: Callable[P, T]) -> Callable[P, T]:
            self._own[platform] = own, when
            return own

        return register

    def __call__(self, *arrays: P.args, **static: P.kwargs) -> T:
        """The value, as the platform that the program is lowered for computes it."""
        if any(when(*arrays, **static) for _, when in self._own.values()):
            return by_platform(_Call(self, tuple(sorted(static.items()))), *arrays)
        return self.plainly(*arrays, **static)

    def on_platform(self, platform: Platform, *arrays: P.args, **static: P.kwargs) -> T:
        """The value, as one platform computes it."""
        own, when = self._own.get(platform, (self.plainly, None))
        return own(*arrays, **static) if when is None or when(*arrays, **static) else self.plainly(*arrays, **static)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a `Replaceable` but for its arrays.

    Attributes:
      function: the function.
      static: its keywords, by name.
    """

    function: Replaceable[..., PyTree]
    static: tuple[tuple[str, object], ...]

    def on(self, target: Target, *arrays: PyTree) -> PyTree:
        """The value, as the target's platform computes it."""
        return self.function.on_platform(target.platform, *arrays, **dict(self.static))

    def like(self, *arrays: PyTree) -> PyTree:
        """The value."""
        return self.function.plainly(*arrays, **dict(self.static))

    def stands_for(self, *arrays: PyTree) -> None:
        """No operation that a policy of `jax.checkpoint` knows."""
        del arrays
