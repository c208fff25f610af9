"""Types that JAX has no name for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

__all__ = ["Index", "PyTree", "Shaped", "State", "Stats", "TreeDef"]

PyTree: TypeAlias = Any
"""Nested containers of arrays, or one array: a batch, the state of an optimizer, what a user's function returns."""

TreeDef: TypeAlias = Any
"""The structure of a pytree: `jax.tree_util.PyTreeDef`, which is no type to a type checker."""

Stats: TypeAlias = Mapping[str, Mapping[str, PyTree]]
"""Path of a weight -> name -> the statistic of its inputs."""

State: TypeAlias = Mapping[str, Mapping[str, PyTree]]
"""Path of a weight -> the static range of its input, or the learned ones of itself and its input."""

Index: TypeAlias = int | jax.Array
"""A position in an array, a loop or a grid: a number, or a value of the program."""


class Shaped(Protocol):
    """An object with the shape and the dtype of an array: a `jax.Array`, a `jax.ShapeDtypeStruct`, a QTensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements."""
        ...
