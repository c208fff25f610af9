"""`Kept`: what was compiled for a function, for as long as the function lives."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from jaxquant.core.types import PyTree

__all__ = ["Kept"]

_Value = TypeVar("_Value")
#: Values of one function; the oldest makes room.
_MOST = 16


class Kept(Generic[_Value]):
    """Values by function and key. They go with the function, or with the object that it is a method of.

    A function is the same if it is the same object: as for `jax.jit`, what it closes over is read when it is traced.

    Example:
      >>> from jaxquant.transform.kept import Kept
      >>> kept, fn = Kept(), lambda x: x + 1
      >>> first = kept.get(fn, "key", lambda fn: [fn(1)])
      >>> kept.get(fn, "key", lambda fn: [fn(1)]) is first
      True
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[Callable[[], object], dict[Hashable, _Value]]] = {}

    def get(self, fn: Callable[..., PyTree], key: Hashable, make: Callable[[Callable[..., PyTree]], _Value]) -> _Value:
        """The value of a function and a key.

        Args:
          fn: the function.
          key: what else the value depends on.
          make: makes the value. Its argument calls ``fn`` without holding it, so that the value does not keep it alive;
            where something cannot be referred to in this way, or has no hash, it is ``fn``, and nothing is kept.
        """
        owner, method = (fn.__self__, fn.__func__) if inspect.ismethod(fn) else (fn, None)
        place = id(owner)
        try:
            found = self._of.get(place)
            if found is None or found[0]() is not owner:
                found = weakref.ref(owner, functools.partial(self._drop, place)), {}
            whole = (method, hash(key), key)
        except TypeError:
            return make(fn)
        self._of[place] = found
        if whole not in found[1]:
            if len(found[1]) == _MOST:
                del found[1][next(iter(found[1]))]
            found[1][whole] = make(_weakly(fn))
        return found[1][whole]

    def _drop(self, place: int, ref: object) -> None:
        if place in self._of and self._of[place][0] is ref:
            del self._of[place]


def _weakly(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A function that calls another one without holding it."""
    ref = weakref.WeakMethod(fn) if inspect.ismethod(fn) else weakref.ref(fn)

    def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
        whole = ref()
        assert whole is not None  # the caller of the value has it
        return whole(*args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):  # of something that does not tell
        call.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return call
