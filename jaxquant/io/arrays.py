"""Arrays between files and JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import jax
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.ops.shardings import shardings
from jaxquant.ops.targets import Platform, check_target, lay_out

__all__ = ["PackedLeaves", "Shardings", "Values", "placing", "to_device", "to_host"]

Values: TypeAlias = QTensor | jax.Array | np.ndarray
"""A leaf that has values: not only a shape."""

Shardings: TypeAlias = (
    jax.sharding.Sharding
    | Mapping[str, jax.sharding.Sharding | None]
    | Callable[[str], jax.sharding.Sharding | None]
    | None
)
"""One sharding for all leaves, or a dict or function from paths to a sharding or None."""


def to_device(array: jax.Array | np.ndarray, sharding: jax.sharding.Sharding | None = None) -> jax.Array | np.ndarray:
    """A copy of an array, placed by ``sharding`` or on the default device.

    Without a sharding, 64-bit arrays stay NumPy arrays where JAX would halve their width. The array is copied, because
    `jax.device_put` alone may return a view of the file, which may be replaced while the array lives, and `jnp.array`
    compiles a program for each shape.
    """
    if isinstance(array, jax.Array):
        return array if sharding is None else jax.device_put(array, sharding)
    if sharding is None and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return np.array(array)
    return jax.device_put(np.array(array, array.dtype.newbyteorder("=")), sharding)


def to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """The array in host memory, in the machine's byte order; a view if possible."""
    if isinstance(leaf, jax.Array):
        # Use another handle to the same buffers: a fetched array caches its host copy as long as it lives, which would
        # add up to a second copy of the model.
        shards = [shard.data for shard in leaf.addressable_shards]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return np.asarray(leaf, leaf.dtype.newbyteorder("="))


class PackedLeaves(Mapping[str, Values]):
    """Parameters by name, with codes packed as in files; each is packed when it is read."""

    def __init__(self, params: Mapping[str, Values]):
        self._params = params

    def __getitem__(self, name: str) -> Values:
        return lay_out(self._params[name], "cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def placing(sharding: Shardings, function: str, target: Platform | None = None) -> Callable[[str, Values], Values]:
    """A function ``(path, leaf)`` that puts a leaf on its devices.

    Args:
      sharding: None, a `jax.sharding.Sharding`, or a dict or function from paths to a sharding or None.
      function: the public function that errors name.
      target: the platform that codes are laid out for; by default that of the leaf's devices.
    """
    check_target(function, target)
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        of: Callable[[str], jax.sharding.Sharding | None] = lambda path: sharding  # noqa: E731
    elif isinstance(sharding, Mapping):
        of = sharding.get
    elif callable(sharding):
        of = sharding
    else:
        todo = "Give a Sharding, or a dict or function from names to shardings"
        raise quant_error(function, "not a sharding", todo=todo, sharding=type(sharding).__name__)

    def place(path: str, leaf: Values) -> Values:
        where = of(path)
        if where is None:
            return lay_out(jax.tree.map(to_device, leaf), target)
        return lay_out(jax.tree.map(to_device, leaf, shardings({path: leaf}, {path: where})[path]), target)

    return place
