"""One layer of a stack of arrays, sliced only where its values are used."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import numpy as np
from jax import lax

__all__ = ["Layer"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Layer:
    """``stack[index]``: a kernel that can find the layer in the stack reads it there, and no copy of it is made.

    Attributes:
      stack: an array with layers along its first axis.
      index: an integer, of which layer.
    """

    stack: jax.Array
    index: jax.Array

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.stack, self.index), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any]) -> Layer:
        return cls(*children)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer."""
        return tuple(self.stack.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Of the layer."""
        return self.stack.dtype

    def array(self) -> jax.Array:
        """The layer, cut out."""
        return cast(jax.Array, lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False))
