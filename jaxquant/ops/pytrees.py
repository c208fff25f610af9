"""Frozen dataclasses of arrays as pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax

__all__ = ["pytree"]

Class = TypeVar("Class", bound=type)


def pytree(*static: str) -> Callable[[Class], Class]:
    """A class decorator that registers a frozen dataclass as a pytree; the ``static`` fields are not arrays."""

    def register(cls: Class) -> Class:
        arrays = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, arrays, list(static))

    return register
