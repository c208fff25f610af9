"""Indices in a dtype that can hold every position they are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["clamped", "widened"]


def widened(indices: ArrayLike) -> jax.Array:
    """The same indices in int32, or int64 if they are that wide; larger unsigned indices become the largest signed one.

    XLA has no gathers and scatters by some narrow dtypes, and sizes of axes wrap in them.
    """
    indices = jnp.asarray(indices)
    signed = np.dtype(np.int64 if indices.dtype.itemsize == 8 else np.int32)
    if jnp.issubdtype(indices.dtype, jnp.unsignedinteger) and indices.dtype.itemsize >= 4:
        indices = jnp.minimum(indices, np.asarray(np.iinfo(signed).max, indices.dtype))
    return indices.astype(signed)


def clamped(start: int | jax.Array, size: int, length: int) -> int | jax.Array:
    """The start of a slice of ``size`` that `jax.lax.dynamic_slice_p` uses: clamped to fit in an axis of ``length``.

    A negative start lies before the axis and is clamped to 0. `jax.lax.dynamic_slice` counts negative starts from the
    end before it binds that primitive; calling it here would count twice.
    """
    if isinstance(start, int | np.integer):
        return min(max(int(start), 0), length - size)
    start = widened(start)
    return jnp.clip(start, 0, np.asarray(length - size, start.dtype))
