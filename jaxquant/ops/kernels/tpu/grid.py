"""The grid of a product with groups: blocks of rows and columns, over parts of K, and the arrays that a step reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.cost import product_cost
from jaxquant.ops.kernels.tpu.decode import BLOCK, scale_of
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.widths import WIDTHS

__all__ = ["Body", "is_of_columns"]


@dataclasses.dataclass(frozen=True)
class Body:
    """One of the two kernels.

    Attributes:
      groups: of the weight.
      planes: the dtypes of the terms of x.
      result: the dtype of the result.
      cores: the number of cores of a chip, which share the columns.
      half: whether 8 of the 16 bfloat16 rows of a register are padding of x: only the other 8 are repeated for groups.
      interpret: whether Pallas' interpreter runs it.
    """

    groups: Groups
    planes: tuple[np.dtype, ...]
    result: DTypeLike
    cores: int = 1
    half: bool = False
    interpret: bool = False

    def __call__(
        self, x: jax.Array, codes: jax.Array, layer: jax.Array | None, arrays: dict[str, jax.Array]
    ) -> jax.Array:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        (b, m, k), n = x.shape, codes.shape[3]
        bm, bn, bk = self.blocks(m, k, n)
        count, parts = arrays["scale"].shape[1], k // bk
        first = () if layer is None else (jnp.reshape(layer * b, 1).astype(jnp.int32),)  # known before a block is read

        def of(name: str, v: jax.Array) -> Any:
            if name == "rows":
                return pl.BlockSpec((None, bm, 1), lambda e, j, i, p, *at: (e, i, 0))
            stacked, one = v.shape[0] == codes.shape[0], name == "all"
            place = lambda e, j, i, p, *at: (e + _first(at) if stacked else e, 0, 0 if one else j)  # noqa: E731
            return pl.BlockSpec((None, v.shape[1], 1 if one else bn), place)

        def weight(e: Index, j: Index, i: Index, p: Index, *at: jax.Ref) -> tuple[Index, ...]:
            part = p if parts == 1 else jnp.where(i == 0, p, parts - 1)  # later rows find their values decoded
            return e + _first(at), part, 0, j

        result = shape_like(x, (b, m, n), self.result)
        order = ("parallel", "parallel", "arbitrary", "arbitrary") if self.cores > 1 else None
        return pl.pallas_call(
            functools.partial(self._run, names=tuple(arrays), skipped=len(first), parts=parts),
            out_shape=result,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(first),
                grid=(b, pl.cdiv(n, bn), pl.cdiv(m, bm), parts),
                in_specs=[
                    pl.BlockSpec((None, bm, bk), lambda e, j, i, p, *at: (e, i, p)),
                    pl.BlockSpec((None, bk // BLOCK, BLOCK, bn), weight),
                    *(of(name, v) for name, v in arrays.items()),
                ],
                out_specs=pl.BlockSpec((None, bm, bn), lambda e, j, i, p, *at: (e, i, j)),
                scratch_shapes=[
                    *([pltpu.VMEM((bm, bn), jnp.float32)] if parts > 1 else []),
                    *(pltpu.VMEM(shape, dtype) for shape, dtype in self._scratch(bm, bn, bk, k, count)),
                ],
            ),
            interpret=self.interpret,
            compiler_params=compiler_params(LIMIT, order=order, interpret=self.interpret),
            cost_estimate=product_cost(x, codes, arrays.values(), result, layers=codes.shape[0] // b),
            name=self.name,
        )(*first, x, codes, *arrays.values())

    def _run(self, *refs: jax.Ref, names: tuple[str, ...], skipped: int, parts: int) -> None:
        from jax.experimental import pallas as pl

        x, codes, *rest = refs[skipped:]
        of, out, scratch = dict(zip(names, rest, strict=False)), rest[len(names)], rest[len(names) + 1 :]

        def write(total: jax.Array) -> None:
            whole = not self.summed and is_of_columns(of)
            factor = self.groups.decoder.factor if self.summed or whole else 1
            total = total if factor == 1 else total * factor
            total = total * scale_of(of["scale"][...], self.groups.scale_form) if whole else total
            for name in ("rows", "columns", "all"):
                total = total * of[name][...] if name in of else total
            out[...] = total.astype(out.dtype)

        if parts == 1:
            write(self._product(x, codes, of, out.shape, scratch))
            return
        sums, part = scratch.pop(0), pl.program_id(3)

        @pl.when(part == 0)
        def _() -> None:
            sums[...] = jnp.zeros(sums.shape, sums.dtype)

        sums[...] += self._product(x, codes, of, out.shape, scratch)

        @pl.when(part == parts - 1)
        def _() -> None:
            write(sums[...])

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        """The product of a block of rows and a block of columns over a part of K, in float32."""
        raise NotImplementedError

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        raise NotImplementedError

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        raise NotImplementedError

    def _parts(self, bm: int, k: int) -> list[int]:
        """The lengths of the parts that K may be cut into, for blocks of so many rows, longest first."""
        del bm
        return [k]

    def _widths(self, m: int, k: int, n: int) -> list[int]:
        """The columns that a block may have."""
        del m, k
        most = n if n < BLOCK else -(-n // BLOCK) * BLOCK
        return [min(width, most) for width in WIDTHS]

    def fits(self, m: int, k: int, n: int) -> bool:
        """Whether the smallest blocks fit in memory."""
        return self._bytes(*self.blocks(m, k, n), k) <= MEMORY

    def blocks(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """Rows and columns of a program, as many as fit in memory, and the part of K that it sums at a time."""
        rows = 16 if self.planes[0] == jnp.bfloat16 else 8  # of a register; those beyond m hold nothing
        whole = -(-m // rows) * rows
        sides = [(min(bm, whole), bn) for bm in self.row_blocks for bn in self._widths(m, k, n)]
        found = [(*side, bk) for side in sides for bk in self._parts(side[0], k)]
        fitting = [block for block in found if self._bytes(*block, k) <= MEMORY]
        return max(fitting, key=lambda block: (block[0] * block[1], block[1], block[2]), default=found[-1])

    name: ClassVar[str]
    row_blocks: ClassVar[tuple[int, ...]]
    summed: ClassVar[bool]


def is_of_columns(of: Mapping[str, jax.Ref]) -> bool:
    """Whether columns have one scale each, which multiplies their sums."""
    return of["scale"].shape[0] == 1 and "offset" not in of


def _first(at: tuple[jax.Ref, ...]) -> Index:
    """The index in the stack of the layer's first weight; the grid runs over all weights of the layer."""
    return at[0][0] if at else 0
