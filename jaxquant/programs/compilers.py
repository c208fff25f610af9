"""Compiles a function for an accelerator that need not be there."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxquant.core.errors import quant_error
from jaxquant.core.jitted import lowered
from jaxquant.programs.chips import Slice, slice_of_chips

__all__ = ["Compiled", "compiled", "compiled_for", "version"]

_EXTRAS = {"tpu": "aot-tpu", "cuda": "aot-gpu"}
_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}


class Compiled(NamedTuple):
    """A program for a target.

    Attributes:
      executable: what `jax.stages.Lowered.compile` returned.
      where: the slice of chips.
      devices: how many of it the program runs on.
      args: the shapes of its arguments, with their shardings over the target.
    """

    executable: Any
    where: Slice
    devices: int
    args: tuple[Any, ...]


def compiled(fn: Callable[..., Any], args: tuple[Any, ...], donated: tuple[int, ...] = ()) -> Any:
    """``fn(*args)``, compiled for the devices at hand; every argument is one of the program."""
    return lowered(jax.jit(fn, keep_unused=True, donate_argnums=donated), *args).compile()


def compiled_for(
    function: str,
    target: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    donated: tuple[int, ...] = (),
    last_minor: bool = False,
) -> Compiled:
    """``fn(*args)``, compiled for a target.

    Arguments are arrays or shapes. Those with a `NamedSharding`, of a mesh of whatever devices or of none
    (`jax.sharding.AbstractMesh`), are sharded so over the target's; all others are on each of them.

    Args:
      function: the public function, for errors.
      target: see `slice_of_chips`.
      fn, args: as in `compiled`.
      donated: the numbers of arguments whose memory results may take, as `jax.jit` has them.
      last_minor: whether the last axis of each argument is stored last; otherwise the compiler chooses.
    """
    meshes = {_axes(sharding.mesh) for sharding in map(_sharding, jax.tree.leaves(args)) if sharding is not None}
    if len(meshes) > 1:
        todo = "Shard all arguments over one mesh"
        raise quant_error(function, "arguments are sharded over several meshes", todo=todo, meshes=sorted(meshes))
    axes = meshes.pop() if meshes else (("chip", 1, AxisType.Auto),)
    names, sizes, kinds = zip(*axes, strict=True)
    count = math.prod(sizes)
    where = slice_of_chips(function, target, count)
    mesh = Mesh(np.asarray(_devices(function, where)[:count]).reshape(sizes), names, axis_types=kinds)

    def placed(x: Any) -> Any:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            x = jax.eval_shape(lambda: jax.numpy.asarray(x))
        sharding = _sharding(x)
        spec = PartitionSpec() if sharding is None else sharding.spec
        sharding = NamedSharding(mesh, spec)
        where = _last_minor(sharding, len(x.shape)) if last_minor else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    args = jax.tree.map(placed, args)
    with _set(mesh):
        return Compiled(compiled(fn, args, donated), where, count, args)


def _last_minor(sharding: Sharding, ndim: int) -> Any:
    from jax.experimental import layout

    kind: Any = getattr(layout, "DeviceLocalLayout", layout.Layout)  # the older name
    return layout.Format(kind(tuple(range(ndim))), sharding)


def version(where: Slice) -> str:
    """The package of the compiler, with its version."""
    package = _PACKAGES[where.chip.platform]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _sharding(x: Any) -> NamedSharding | None:
    sharding: Sharding | None = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _axes(mesh: Any) -> tuple[tuple[str, int, AxisType], ...]:
    kinds = mesh.axis_types or (AxisType.Auto,) * len(mesh.axis_names)
    return tuple((name, size, kind) for (name, size), kind in zip(mesh.shape.items(), kinds, strict=True))


def _set(mesh: Mesh) -> Any:
    """A context in which a mesh of explicit axes is set, so that a `PartitionSpec` names its axes.

    Automatic axes need no context, and a `jax.shard_map` over another such mesh would refuse it. JAX before 0.7 has no
    such context.
    """
    use = getattr(jax.sharding, "use_abstract_mesh", None)
    automatic = all(kind is AxisType.Auto for kind in mesh.axis_types)
    return contextlib.nullcontext() if use is None or automatic else use(mesh.abstract_mesh)


@contextlib.contextmanager
def _shared_libtpu() -> Iterator[None]:
    """Loads libtpu without its lock, which is needed only by processes that use the devices."""
    name = "ALLOW_MULTIPLE_LIBTPU_LOAD"
    if name in os.environ or "tpu" in os.environ.get("JAX_PLATFORMS", ""):
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


@functools.cache
def _devices(function: str, where: Slice) -> list[Any]:
    """Descriptions of the devices of a slice, from the compiler's own library."""
    from jax.experimental import topologies

    chip = where.chip
    options = {} if chip.description is None else {"target_config": chip.description, "topology": where.topology}
    name = where.topology if chip.description is None else chip.family
    try:
        with _shared_libtpu():
            return list(topologies.get_topology_desc(name, platform=chip.platform, **options).devices)
    except Exception as e:
        extra = _EXTRAS[chip.platform]
        rule = f"the compiler for {chip.name} does not answer: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        todo = f"Install it with 'pip install jaxquant[{extra}]', and name a slice that exists"
        raise quant_error(function, rule, todo=todo, topology=where.topology) from e
