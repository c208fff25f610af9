"""Arrays of files to arrays of JAX: always copies, since a file may be replaced or cut while the arrays live."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["to_device"]


def to_device(array: Any, sharding: Any = None) -> Any:
    """A copy of an array, placed by ``sharding`` or on the default device.

    Without a sharding, arrays of 64 bits stay NumPy's where JAX would halve their width. `jax.device_put` alone may
    give a view of the file, and `jnp.array` compiles a program for each new shape.
    """
    if isinstance(array, jax.Array):
        return array if sharding is None else jax.device_put(array, sharding)
    if sharding is None and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return np.array(array)
    return jax.device_put(np.array(array, array.dtype.newbyteorder("=")), sharding)
