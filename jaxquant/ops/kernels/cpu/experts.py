"""Ragged products by stored experts on the CPU: the rows of each expert, in tiles, by a kernel for one weight.

XLA:CPU multiplies all rows by every expert, and takes float experts or int8 ones. Here an expert that has no rows is
not read, and codes stay as they are stored. There are two exceptions. Experts that share a scale, or whose channels are
permuted, are brought to one code per element first. Under `jax.vmap` over the sizes each step copies the experts of all
mapped products.

The tile is chosen by the average number of rows of an expert, so that an expert with many more is read several times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.types import Index, PyTree
from jaxquant.core.views import by_layer
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.cpu.blocks import total
from jaxquant.ops.kernels.cpu.products import PRODUCTS
from jaxquant.ops.kernels.segments import Segments, spans
from jaxquant.ops.problem import Kernel, Product, RaggedProduct
from jaxquant.ops.trained import TrainedTensor, is_in_training

__all__ = ["EachExpert"]

_MOST = 64
"""Rows of a tile, at most: a longer one reads an expert hardly less often, and multiplies more rows of others."""


@dataclasses.dataclass(frozen=True)
class EachExpert(Kernel[RaggedProduct]):
    """A loop over tiles of rows, each of one expert.

    Attributes:
      kernel: for a tile and its expert.
      tile: the number of rows.
    """

    operation = RaggedProduct
    platforms = ("cpu",)

    kernel: Kernel[Product]
    tile: int

    @property
    def name(self) -> str:
        """That of the kernel for one expert."""
        return self.kernel.name

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: stored experts of known sizes that a kernel for one weight takes."""
        w = problem.w
        if not isinstance(w, QTensor) or is_in_training(w) or not all(isinstance(n, int) for n in w.shape):
            return None
        tile = _rows_of_tile(problem.x.shape[0], w.shape[0])
        one = jax.eval_shape(lambda p: _Tiles.of(p, tile).product(0, 0), problem)
        found = (kind.takes(one) for kind in PRODUCTS)
        kernel = next((kernel for kernel in found if kernel is not None), None)
        return None if kernel is None else cls(kernel, tile)

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`."""
        rows, size = problem.x.shape[0], self.tile
        parts = _Tiles.of(problem, size)
        numbers = lax.iota(jnp.int32, problem.sizes.shape[0])
        segments = Segments(*spans(problem.sizes, rows), numbers, numbers)

        def step(i: jax.Array, out: jax.Array) -> jax.Array:
            tile = segments.tile(jnp.asarray(i), size)  # without jit a loop counts by Python's integers
            y = self.kernel.run(parts.product(tile.start, tile.expert)).astype(out.dtype)
            before = lax.dynamic_slice_in_dim(out, tile.start, size)
            mine = tile.start + lax.iota(jnp.int32, size) < tile.end
            return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], y, before), tile.start, axis=0)

        out = jnp.zeros((rows + size, problem.w.shape[2]), problem.result) + _zero((parts.x, parts.w, problem.sizes))
        return lax.fori_loop(jnp.int32(0), segments.number_of_tiles(size), step, out)[:rows].astype(problem.result)


def _rows_of_tile(rows: Any, experts: int) -> int:
    """Twice as many as an expert has on average, a power of two; a symbolic number of rows counts as many."""
    if not isinstance(rows, int):
        return _MOST
    return min(rows, _MOST, 1 << (-(-2 * rows // experts) - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The operands of a ragged product, of which tiles are taken.

    Attributes:
      x: the rows, with as many more as a tile has, so that each tile can be cut out.
      w: the experts, first in every array.
      problem: the product.
      size: rows of a tile.
    """

    x: Operand
    w: QTensor
    problem: RaggedProduct
    size: int

    @classmethod
    def of(cls, problem: RaggedProduct, size: int) -> _Tiles:
        x, w = problem.x, problem.weight
        x = by_layer(x.frozen if isinstance(x, TrainedTensor) else x) if isinstance(x, QTensor) else x
        longer = jax.tree.map(lambda v: jnp.pad(v, [(0, size)] + [(0, 0)] * (v.ndim - 1)), x)
        return cls(longer, _with_experts_first(w), problem, size)

    def product(self, first: Index, expert: Index) -> Product:
        """The product of the rows from ``first`` on and an expert."""
        x = jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, first, self.size), self.x)
        w = _expert(self.w, expert)
        return Product(x, w, self.problem.precision, self.problem.result, Axes.of(2, (), (1,)), Axes.of(2, (), (0,)))


def _zero(operands: PyTree) -> jax.Array:
    """A zero that varies over the devices of a `jax.shard_map` as any of the operands does."""
    values = (v[(0,) * v.ndim].astype(jnp.float32) for v in jax.tree.leaves(operands))
    return total(jnp.where(v > 0, jnp.float32(0), jnp.float32(0)) for v in values)


def _with_experts_first(w: QTensor) -> QTensor:
    """The same values, with experts first in every array; of codes in a stack of layers, in those of a layer."""
    arrays = (w.kept, *jax.tree.leaves((w.scale, w.zero_point, w.offset)))
    if w.stored_order[0] == 0 and w.permutation is None and all(v.shape[0] == w.shape[0] for v in arrays):
        return w
    w = by_layer(w.apart())
    return w if w.permutation is None else jax.vmap(lambda one: one.unpermuted())(w)


def _expert(w: QTensor, index: Index) -> QTensor:
    """One of the experts, cut out of the whole stack of layers if it is in one."""

    def one(value: Any) -> Any:
        whole = w.in_stack(value)
        if whole is value:
            return lax.dynamic_index_in_dim(value, index, keepdims=False)
        return whole[w.layer, index]

    others = {name: jax.tree.map(one, getattr(w, name)) for name in ("scale", "zero_point", "offset", "seal")}
    return w.replace(codes=one(w.kept), **others)
