"""The codes of one layer of a stack, sliced only where their values are used."""

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
    """The codes of ``stack[index]``: a kernel that can find the layer in the stack reads it there, and makes no copy.

    Attributes:
      stack: a `QTensor` with layers along the first axis of every array. A constant for derivatives: the layer's own
        scales have the gradient.
      index: an integer, of which layer.
    """

    stack: Any
    index: jax.Array

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.stack, self.index), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any]) -> Layer:
        return cls(*children)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's codes."""
        return tuple(self.stack.kept.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Of the codes."""
        return self.stack.kept.dtype

    def array(self) -> jax.Array:
        """The codes, cut out."""
        return cast(jax.Array, lax.dynamic_index_in_dim(self.stack.kept, self.index, keepdims=False))
