"""Indices in a dtype that can say every place they are compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["clamped", "widened"]


def widened(indices: Any) -> jax.Array:
    """The same indices in int32, or int64 if they are that wide; what no signed integer of the width says becomes the
    largest.

    XLA has no gathers and scatters by some narrow dtypes, and sizes of axes wrap in them.
    """
    indices = jnp.asarray(indices)
    signed = np.dtype(np.int64 if indices.dtype.itemsize == 8 else np.int32)
    if jnp.issubdtype(indices.dtype, jnp.unsignedinteger) and indices.dtype.itemsize >= 4:
        indices = jnp.minimum(indices, np.asarray(np.iinfo(signed).max, indices.dtype))
    return indices.astype(signed)


def clamped(start: Any, size: int, length: int) -> Any:
    """The start of a slice of ``size`` that `jax.lax.dynamic_slice_p` uses: clamped to fit in an axis of ``length``.

    A start that is negative is before the axis. `jax.lax.dynamic_slice` has counted from the end before it binds that
    primitive, and would again.
    """
    if isinstance(start, int | np.integer):
        return min(max(int(start), 0), length - size)
    start = widened(start)
    return jnp.clip(start, 0, np.asarray(length - size, start.dtype))
