"""`shardings`: where each array of a `QTensor` lies, derived from where the float parameter lies."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxquant.core.blocks import spread
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.packing import packed_length
from jaxquant.core.paths import Params, is_qtensor, path_of
from jaxquant.core.qtensor import Operand, QTensor, flat, scale_values
from jaxquant.core.stack import Layer
from jaxquant.core.types import PyTree
from jaxquant.ops.trained import TrainedTensor

__all__ = ["Cut", "axis_names", "explicit_of", "explicit_sharding", "leaf_specs", "shardings", "whole_blocks"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Into how many parts each axis of a float array is cut, and along which mesh axes.

    Attributes:
      entries: for each axis of the array, what a `PartitionSpec` says.
      parts: for each axis, the number of parts.
      names: the mesh axes of all entries.
    """

    entries: tuple[object, ...]
    parts: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, spec: PartitionSpec, ndim: int) -> Cut:
        """From a spec, which may be shorter than the array's rank."""
        entries, named = (*spec, *[None] * (ndim - len(spec))), axis_names(spec, ndim)
        parts = tuple(math.prod(mesh.shape[n] for n in names) for names in named)
        return cls(entries, parts, tuple(n for names in named for n in names))

    def spec(self, axes: Iterable[int | None]) -> PartitionSpec:
        """The entries of these axes; of None, nothing."""
        return PartitionSpec(*(None if i is None else self.entries[i] for i in axes))

    def parts_joined(self, q: QTensor) -> int:
        """Parts of the axes that are stored as one with those before them: these are no runs of that one."""
        others = q.stored_order[q.ndim - q.joined + 1 :] if q.joined else ()
        return math.prod(self.parts[axis] for axis in others)

    def local(self, q: QTensor) -> QTensor:
        """A QTensor whose arrays have been cut: the static length of a packed row is that of a shard."""
        length = None if q.length is None else q.length // self.parts[q.stored_order[-1]]
        scale, offset = (self.of_blocks(v).local(v) if isinstance(v, QTensor) else v for v in (q.scale, q.offset))
        local = q.replace(length=length, scale=scale, offset=offset)
        return TrainedTensor(local, q.real) if isinstance(q, TrainedTensor) else local

    def of_blocks(self, value: Operand) -> Cut:
        """Of a scale or zero point: cut where whole blocks lie in each part, else on all devices."""
        axes = [i if n > 1 and self.parts[i] and n % self.parts[i] == 0 else None for i, n in enumerate(value.shape)]
        return Cut(tuple(self.spec(axes)), tuple(1 if i is None else self.parts[i] for i in axes), self.names)


def axis_names(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """For each axis of an array of this rank, the mesh axes that a spec partitions it over."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    named = [() if e is None else e if isinstance(e, tuple) else (e,) for e in entries]
    return [tuple(n for n in names if isinstance(n, str)) for names in named]  # an axis may be unconstrained


def leaf_specs(leaf: Operand | None, cut: Cut) -> PyTree:
    """A tree of `PartitionSpec`s for the arrays of a leaf."""
    if leaf is None:
        return None
    if not isinstance(leaf, QTensor):
        return cut.spec(range(len(leaf.shape)))
    permuted = leaf.permuted_axis if leaf.ndim else None
    whole = Cut(cut.entries, tuple(0 if i == permuted else n for i, n in enumerate(cut.parts)), cut.names)
    stored: list[int | None] = list(leaf.stored_order)
    if leaf.joined:
        del stored[leaf.ndim - leaf.joined + 1 :]
    if leaf.block_axis is not None:  # whole groups lie in each part
        stored.insert(leaf.block_axis + 1, None)
    codes: Any = cut.spec(stored)
    if isinstance(leaf.kept, Layer):
        layers = Cut((None, *cut.entries), (1, *cut.parts), cut.names)
        codes = Layer(leaf_specs(leaf.kept.stack, layers), typing.cast(Any, PartitionSpec()))

    def of_blocks(value: Operand | None, cut: Cut = cut) -> PyTree:
        return None if value is None else leaf_specs(value, cut.of_blocks(value))

    specs = QTensor(
        codes,
        of_blocks(leaf.scale),
        of_blocks(leaf.zero_point),
        of_blocks(leaf.offset),
        of_blocks(leaf.permutation, whole),
        of_blocks(leaf.seal),
        qtype=leaf.qtype, dtype=leaf.dtype, minor=leaf.minor, length=leaf.length, split=leaf.split, joined=leaf.joined,
    )  # fmt: skip
    return TrainedTensor(specs, leaf_specs(leaf.real, cut)) if isinstance(leaf, TrainedTensor) else specs


def whole_blocks(q: QTensor, cut: Cut) -> QTensor:
    """The same values in a form whose every array can be cut where the float array is.

    A block that straddles a boundary becomes several with one scale; packed rows whose parts are not whole bytes are
    unpacked, and a permuted axis that is cut is put in order.
    """
    if q.permutation is not None and cut.parts[q.permuted_axis] > 1:
        q = q.unpermuted()
    if cut.parts_joined(q) > 1:
        q = q.unjoined()
    at = q.block_axis
    if at is not None and q.kept.shape[at] % cut.parts[q.stored_order[at]]:
        q = q.whole()
    shape = q.shape

    def split(value: jax.Array) -> jax.Array:
        sizes = list(value.shape)
        for axis, (n, parts) in enumerate(zip(value.shape, cut.parts, strict=True)):
            if n > 1 and n % parts:
                sizes[axis] = shape[axis] // math.gcd(shape[axis] // n, shape[axis] // parts)
        return spread(value, sizes)

    straddles = any(n > 1 and n % parts for n, parts in zip(q.scale.shape, cut.parts, strict=True))
    scale = split(scale_values(q.scale)) if straddles else q.scale
    offset = split(flat(q.offset)) if straddles and q.offset is not None else q.offset
    zero_point = None if q.zero_point is None else split(q.zero_point)
    scale = whole_blocks(scale, cut.of_blocks(scale)) if isinstance(scale, QTensor) else scale
    q = q.replace(scale=scale, zero_point=zero_point, offset=offset)
    axis = q.stored_order[-1]
    if q.length is not None and (q.length // cut.parts[axis]) * q.type.bits % 8 and cut.parts[axis] > 1:
        return q.replace(codes=q.unpacked(), length=None)
    return q


def explicit_sharding(aval: object) -> NamedSharding | None:
    """The sharding that is part of a type, where the mesh has explicit axes; else None."""
    sharding = getattr(aval, "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in (sharding.mesh.axis_types or ())
    return sharding if explicit else None


def explicit_of(leaf: object) -> NamedSharding | None:
    """Where an array, or the one that a QTensor stands for, lies on a mesh of explicit axes; None on any other."""
    if not isinstance(leaf, QTensor):
        return None if isinstance(leaf, jax.ShapeDtypeStruct) else explicit_sharding(jax.typeof(leaf))
    if isinstance(leaf.kept, Layer):
        return None  # the equation that multiplies a layer says where it lies
    placed = explicit_of(leaf.kept)
    if placed is None:
        return None
    stored = [*placed.spec, *(None,) * (len(leaf.kept.shape) - len(placed.spec))]
    if leaf.block_axis is not None:
        del stored[leaf.block_axis + 1]
    stored += [None] * max(leaf.joined - 1, 0)
    axes = (stored[leaf.stored_order.index(axis)] for axis in range(leaf.ndim))
    return NamedSharding(placed.mesh, PartitionSpec(*axes))


def _check_parts(path: str, leaf: QTensor, cut: Cut, spec: str) -> None:
    """Raises if codes, or those of quantized scales, cannot be cut into equal parts."""
    if cut.parts_joined(leaf) > 1:
        raise quant_error(
            "shardings", f"the last {leaf.joined} axes are stored as one, of which the first alone can be cut",
            todo="Shard that axis, or lay codes out for another platform (ops.lay_out)", path=path, spec=spec,
            shape=leaf.shape,
        )  # fmt: skip
    for axis, (n, parts) in enumerate(zip(leaf.shape, cut.parts, strict=True)):
        stored = packed_length(n, leaf.type.bits) if leaf.length is not None and leaf.stored_order[-1] == axis else n
        at = leaf.block_axis if leaf.split == axis - leaf.ndim else None
        blocks = n if at is None else leaf.kept.shape[at]
        if blocks % parts:
            raise quant_error(
                "shardings", f"{blocks} {'blocks' if blocks != n else 'elements'} on axis {axis - leaf.ndim} cannot be "
                f"cut into {parts} equal parts",
                todo="Shard another axis, or fewer ways", path=path, spec=spec, shape=leaf.shape,
            )  # fmt: skip
        if stored % parts:
            bytes_ = f", which are {stored} bytes of packed codes" if stored != n else ""
            raise quant_error(
                "shardings", f"{n} elements on axis {axis - leaf.ndim}{bytes_} cannot be cut into {parts} equal parts",
                todo="Shard another axis, or fewer ways", path=path, spec=spec, shape=leaf.shape,
            )  # fmt: skip
    if isinstance(leaf.scale, QTensor):
        _check_parts(f"{path}.scale", leaf.scale, cut.of_blocks(leaf.scale), spec)


def _derived(path: str, leaf: PyTree, sharding: Sharding) -> PyTree:
    """The sharding of one leaf, or a tree of them for a QTensor."""
    if not isinstance(leaf, QTensor):
        return sharding
    if isinstance(sharding, SingleDeviceSharding):
        return jax.tree.map(lambda _: sharding, leaf)
    if not isinstance(sharding, NamedSharding):
        todo = "Use a jax.sharding.NamedSharding"
        raise quant_error(
            "shardings", "this kind of sharding names no axes", todo=todo, path=path, sharding=type(sharding).__name__
        )
    if len(sharding.spec) > leaf.ndim:
        todo = "Give one entry per axis of the float parameter at most"
        raise quant_error(
            "shardings", "the spec has more entries than the parameter has axes", todo=todo, path=path,
            spec=str(sharding.spec), shape=leaf.shape,
        )  # fmt: skip
    cut = Cut.of(sharding.mesh, sharding.spec, leaf.ndim)
    _check_parts(path, leaf, cut, str(sharding.spec))
    specs = leaf_specs(leaf, cut)
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def shardings(qparams: Params, shardings: PyTree) -> PyTree:
    """Shardings for a tree with `QTensor`s, from those of the float parameters.

    The codes of a QTensor are cut along the axes along which the float array is, wherever storage has put them; scales
    and zero points follow where every part holds whole blocks. Where a block straddles a boundary (one scale per output
    channel of a weight that is cut along its input channels, say) they lie on all devices that share it.

    Args:
      qparams: parameters, some of them QTensors; arrays or `jax.ShapeDtypeStruct`s.
      shardings: a `jax.sharding.NamedSharding` for each float parameter: a tree of the parameters' structure, or a
        prefix of it, such as one sharding for all.

    Returns:
      A tree of the structure of ``qparams`` with a sharding for each array: for `jax.device_put`, ``in_shardings`` and
      checkpoint readers.

    Raises:
      QuantError: naming the path, if the trees do not match, a spec has too many entries, or packed codes cannot be cut
        into equal parts.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
      >>> w = jq.quantize(jnp.ones((64, 32)), jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> found = jq.ops.shardings({"w": w}, {"w": NamedSharding(mesh, P("model", None))})["w"]
      >>> tuple(found.codes.spec), tuple(found.scale.spec)  # codes are stored [32, 64]: contraction-minor
      ((None, 'model'), (None, None))
    """

    def below(prefix: tuple[object, ...], sharding: Sharding, tree: Params) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: _derived(path_of((*prefix, *keys)), leaf, sharding), tree, is_leaf=is_qtensor
        )

    is_sharding = lambda x: isinstance(x, Sharding)  # noqa: E731
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shardings, is_leaf=is_sharding)[0]:
        if not is_sharding(leaf):
            todo = "Pass a tree of NamedSharding with the structure of the float params"
            raise quant_error("shardings", "a leaf is no sharding", todo=todo, path=path_of(keys), leaf=leaf)
    try:
        return jax.tree_util.tree_map_with_path(below, shardings, qparams, is_leaf=is_sharding)
    except QuantError:
        raise
    except ValueError as error:
        todo = "Pass the tree of the float params' shardings, or a prefix of it"
        raise quant_error("shardings", f"the trees do not match ({error})", todo=todo) from None
