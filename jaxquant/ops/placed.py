"""Products on a mesh of explicit axes, where types say how each array lies: each device multiplies its own parts.

XLA partitions its own operations over several devices, but on TPUs no kernel. A `jax.shard_map` does it here: the
kernel is chosen for the parts that one device has, and the results of parts of a contracted axis are added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxquant.core.affine import as_codes
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.sizes import number
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.shardings import Cut, axis_names, leaf_specs

__all__ = ["Parts", "Placed", "on_each_device", "quantized_parts"]

Names = tuple[str, ...]
Type = tuple[NamedSharding | None, int]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parts:
    """How one array is partitioned over a mesh. Hashable.

    Attributes:
      mesh: as the array's type has it, with explicit axes.
      names: for each axis of the array, the mesh axes that it is partitioned over.
    """

    mesh: Mesh | AbstractMesh
    names: tuple[Names, ...]

    @property
    def spec(self) -> PartitionSpec:
        """The same for JAX."""
        return PartitionSpec(*(names or None for names in self.names))

    @property
    def cut(self) -> Cut:
        """The same, with the number of parts."""
        return Cut.of(self.mesh, self.spec, len(self.names))

    def holds_whole(self, axes: Iterable[int]) -> bool:
        """Whether every device has all of these axes."""
        return not any(self.names[i] for i in axes)

    def fits(self, v: Operand) -> bool:
        """Whether each part of an array or a QTensor has whole blocks and bytes, so that nothing is converted."""
        return _fits(v, self.cut)


@dataclasses.dataclass(frozen=True)
class Placed:
    """How the operands of a product and its result are partitioned over one mesh. Hashable.

    Attributes:
      lhs, rhs, out: each array.
      summed: the mesh axes that partition contracted axes.
      scattered: the axis of the result that is partitioned over these mesh axes after the sum; None: the sum is on all.
    """

    lhs: Parts
    rhs: Parts
    out: Parts
    summed: Names
    scattered: int | None = None

    @classmethod
    def of(
        cls, lhs: Type, rhs: Type, numbers: lax.DotDimensionNumbers, result: NamedSharding | None = None
    ) -> Placed | None:
        """From the shardings that are part of the operands' types.

        Args:
          lhs, rhs: the sharding, None where the type has none, and the rank of each operand.
          numbers: the dimension numbers, with axes counted from the front.
          result: where the program wants the result.

        Returns:
          None if the mesh has other axes too, if nothing is partitioned, or if an operand would have to be moved: both
          are partitioned along axes that they share, but not alike, or along other axes over the same devices.
        """
        known = lhs[0] or rhs[0]
        if known is None or any(kind is not AxisType.Explicit for kind in known.mesh.axis_types):
            return None
        if any(s is not None and getattr(s.spec, "unreduced", None) for s in (lhs[0], rhs[0], result)):
            return None  # parts of a sum
        left, right = _names(*lhs), _names(*rhs)
        (lc, rc), (lb, rb) = numbers
        shared = list(zip((*lc, *lb), (*rc, *rb), strict=True))
        for i, j in shared:  # an operand that every device has whole is cut as the other is
            left[i], right[j] = left[i] or right[j], right[j] or left[i]
        out = [*(left[i] for i in lb), *_others(left, (*lc, *lb)), *_others(right, (*rc, *rb))]
        summed = tuple(name for i in lc for name in left[i])
        used = [*summed, *(name for names in out for name in names)]
        if not used or len(set(used)) < len(used) or any(left[i] != right[j] for i, j in shared):
            return None
        wanted = _names(result, len(out))
        scattered = next((i for i, names in enumerate(wanted) if summed and names == summed and not out[i]), None)
        if scattered is not None:
            out[scattered] = summed
        one, other, made = (Parts(known.mesh, tuple(names)) for names in (left, right, out))
        return cls(one, other, made, summed, scattered)

    def fits(self, lhs: Operand, rhs: Operand) -> bool:
        """As for `Parts`, of both operands."""
        return self.lhs.fits(lhs) and self.rhs.fits(rhs)

    def run(self, product: Callable[[Operand, Operand], jax.Array], lhs: Operand, rhs: Operand) -> jax.Array:
        """``product(lhs, rhs)`` of the parts on each device, with the results of contracted parts added."""

        def local(lhs: Operand, rhs: Operand) -> jax.Array:
            y = product(_local(lhs, self.lhs), _local(rhs, self.rhs))
            if self.scattered is not None:
                return lax.psum_scatter(y, self.summed, scatter_dimension=self.scattered, tiled=True)
            return lax.psum(y, self.summed) if self.summed else y

        specs = leaf_specs(lhs, self.lhs.cut), leaf_specs(rhs, self.rhs.cut)
        return on_each_device(local, self.out.mesh, specs, self.out.spec)(lhs, rhs)


@Replaceable
def quantized_parts(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], parts: Parts) -> QTensor:
    """`as_codes` of an array by its own range, where every device has whole blocks."""
    del parts
    return as_codes(x, spec, axes)


def on_each_device(
    fn: Callable[..., T], mesh: Mesh | AbstractMesh, in_specs: PyTree, out_specs: PyTree
) -> Callable[..., T]:
    """``fn`` of the parts that each device has, by the mesh that is set, or by this one."""
    here = jax.sharding.get_abstract_mesh()  # its axes may be automatic now
    return jax.shard_map(fn, mesh=mesh if here.empty else here, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local(v: Operand, parts: Parts) -> Operand:
    return parts.cut.local(v) if isinstance(v, QTensor) else v


def _names(sharding: NamedSharding | None, ndim: int) -> list[Names]:
    return axis_names(PartitionSpec() if sharding is None else sharding.spec, ndim)


def _others(of: list[Names], axes: tuple[int, ...]) -> list[Names]:
    return [names for i, names in enumerate(of) if i not in axes]


def _fits(v: Operand, cut: Cut) -> bool:
    def divided(shape: tuple[int, ...]) -> bool:
        return all(number(n) % parts == 0 for n, parts in zip(shape, cut.parts, strict=True))

    if not isinstance(v, QTensor):
        return divided(v.shape)
    blocks = [b for b in (v.scale, v.zero_point, v.offset) if b is not None]
    if v.permutation is not None or not divided(v.shape):
        return False
    for b in blocks:
        own = cut.of_blocks(b)
        if any(n > 1 and n % p for n, p in zip(b.shape, cut.parts, strict=True)) or not _fits(b, own):
            return False
    if v.block_axis is not None and v.kept.shape[v.block_axis] % cut.parts[v.stored_order[v.block_axis]]:
        return False
    if cut.parts_joined(v) > 1:
        return False
    return v.length is None or v.length // cut.parts[v.stored_order[-1]] * v.type.bits % 8 == 0
