"""`shardings`: derives the shardings of an optimizer's state from those of the parameters."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, is_qtensor, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.optim.moments import StoredMoment
from jaxquant.optim.scale import State

__all__ = ["shardings"]

_Entry: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes over which an array's axis is partitioned."""


def shardings(state: PyTree, params: Params) -> PyTree:
    """Shardings for a state: each moment is sharded like its parameter.

    Codes and scales of a moment in its parameter's shape are partitioned as the parameter is, along each axis on which
    every part has whole bytes and blocks. A flattened moment is partitioned along its blocks, over all mesh axes of the
    parameter. Arrays that cannot be partitioned evenly, and all counts, are replicated.

    Args:
      state: of a quantized optimizer, or a chain with some: arrays, or their shapes from `jax.eval_shape`.
      params: the parameters: arrays, or shapes with a ``sharding``, on one mesh.

    Returns:
      A tree like ``state`` of `NamedSharding`s, for ``out_shardings`` of `jax.jit`, or `jax.device_put`.

    Raises:
      QuantError: naming the leaf, if a parameter has no `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> from jaxquant import optim
      >>> mesh = Mesh(jax.devices()[:1], ("x",))
      >>> params = {"w": jax.device_put(jnp.ones((64, 256)), NamedSharding(mesh, PartitionSpec("x")))}
      >>> tx = optim.adam8bit(1e-3)
      >>> places = optim.shardings(jax.eval_shape(tx.init, params), params)
      >>> jax.jit(tx.init, out_shardings=places)(params)[0].moments["m"]["w"].codes.sharding.spec[0]
      'x'
    """
    leaves, _ = leaves_with_paths(params)
    for path, p in leaves.items():
        if not isinstance(getattr(p, "sharding", None), NamedSharding):
            todo = "Put it on a mesh with jax.device_put, or give its shape a sharding"
            raise quant_error("shardings", "a parameter must have a NamedSharding", todo=todo, path=path, parameter=p)
    mesh = next(iter(leaves.values())).sharding.mesh if leaves else None
    everywhere: PyTree = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def of(s: PyTree) -> PyTree:
        if not isinstance(s, State):
            return everywhere
        placed = {
            name: jax.tree.map(lambda p, m: _placed(m, p.shape, p.sharding), params, tree, is_leaf=is_qtensor)
            for name, tree in s.moments.items()
        }
        return State(everywhere, placed)

    return jax.tree.map(of, state, is_leaf=lambda s: isinstance(s, State))


def _placed(m: StoredMoment, shape: tuple[int, ...], sharding: NamedSharding) -> PyTree:
    if not isinstance(m, QTensor):
        return sharding
    if tuple(m.shape) == tuple(shape):
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    else:
        names = [name for entry in sharding.spec for name in _names(entry)]
        spec = (tuple(names) or None, None)
    return jax.tree.map(lambda x: NamedSharding(sharding.mesh, _cut(x.shape, spec, sharding.mesh)), m)


def _cut(shape: tuple[int, ...], spec: tuple[_Entry, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The entries of a spec that partition axes of this shape evenly."""
    parts = [math.prod(mesh.shape[name] for name in _names(entry)) for entry in spec]
    return PartitionSpec(*(entry if n % k == 0 else None for entry, n, k in zip(spec, shape, parts, strict=True)))


def _names(entry: _Entry) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
