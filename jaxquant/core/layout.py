"""Axes of arrays in another order."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.core.replaceable import Replaceable

__all__ = ["transpose", "written_transposed"]


def transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """`jnp.transpose`; emits no operation for the identity."""
    return x if tuple(order) == tuple(range(x.ndim)) else jnp.transpose(x, order)


@Replaceable
def written_transposed(x: jax.Array, *, order: tuple[int, ...]) -> jax.Array:
    """The transpose of an array, from memory to memory."""
    return transpose(x, order)
