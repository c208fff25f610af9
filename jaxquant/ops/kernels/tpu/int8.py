"""Products of int8 codes with one scale per row on either side, for many rows, where XLA's own take longer.

    y[m, n] = s[m] t[n] sum_k x[m, k] w[k, n]

A step of the grid multiplies a block of rows with a block of columns over all of K, and scales the sums. Rows change
first, so that a block of the weight is read once.

Estimates of libtpu 0.0.42.1 for a v6e, [M, 4096] x [4096, 4096], in thousand cycles of static schedules, moving
included: 87 for 2048 rows (XLA's product: 121), 163 for 4096. Arithmetic at the peak takes 66 and 131. The matrix unit
works in 91 of 100 instructions; loading the first blocks, and each further block of the weight, takes the rest. Up to
1024 rows XLA's product takes as long or less: 44 for 1024 rows on either side, 23 for 512 where this has 26.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.ops.forms import Axes, Matrix
from jaxquant.ops.kernels.integer import Int8, multiplies_integers, overflow_limit
from jaxquant.ops.kernels.tpu.chips import V6E
from jaxquant.ops.kernels.tpu.cost import product_cost
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.undivided import run_undivided
from jaxquant.ops.problem import Kernel, Product

__all__ = ["Int8Blocks", "Int8Layer", "int8_product"]

_LEAST = 1025
"""The fewest rows for which the kernel takes less time than XLA's product."""

_FEW = 64
"""The most rows for which reading a layer takes longer than multiplying it."""

_ROWS, _COLUMNS = (512, 256), (1024, 512)  # of a block; with 512 columns reading x takes longer than multiplying it


@dataclasses.dataclass(frozen=True)
class Int8Blocks(Kernel):
    """A product of codes with sums in int32, as `Int8` computes it, to the bit.

    Attributes:
      columns_last: whether codes of the weight are stored as [B, K, N]; else as [B, N, K].
    """

    platforms = ("tpu",)
    chips = (V6E,)  # on a v5e XLA's product takes 1.04 times its arithmetic
    name = "int8_blocks"
    interpret = False

    columns_last: bool

    @classmethod
    def takes(cls, problem: Product) -> Kernel | None:
        """As for `Kernel`: many rows of signed int8 on both sides, with a weight that is stored as a matrix."""
        sizes = (*problem.x.shape, *problem.w.shape)
        if not all(isinstance(n, int) for n in sizes) or not multiplies_integers(problem) or not cls._is_for(problem):
            return None
        x, w = problem.forms
        if not isinstance(x, Matrix) or not isinstance(w, Matrix):
            return None
        plain = all(f.zero_point is None and f.groups == 1 for f in (x, w))
        if not plain or problem.w.kept.dtype != jnp.int8 or not problem.w.type.signed:
            return None
        (_, n, k), axes, order = w.shape, problem.w_axes, problem.w.stored_order
        orders = {axes.order: False, axes.batch + axes.contract + axes.rows: True}
        fits = k % 128 == 0 and n >= 128 and k <= overflow_limit(x.reach, w.reach)
        fits = fits and _blocks(int(problem.rows), k, n) is not None
        return cls(orders[order]) if fits and order in orders else None

    @classmethod
    def _is_for(cls, problem: Product) -> bool:
        """Whether it takes less time than XLA's product."""
        return problem.rows >= _LEAST

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`; if XLA partitions the program over several devices, by XLA's product."""
        return run_undivided(problem, self._undivided, Int8().run)

    def _undivided(self, problem: Product) -> jax.Array:
        x, w = problem.matrices()
        (b, m, k), n = x.shape, w.shape[1]
        codes = problem.w.in_stack(problem.w.kept).reshape(-1, *((k, n) if self.columns_last else (n, k)))
        rows = jnp.broadcast_to(x.scale.astype(jnp.float32), (b, m, 1))
        columns = _columns(problem.w, problem.w_axes)
        if columns is None:
            columns = jnp.broadcast_to(jnp.swapaxes(w.scale, 1, 2).astype(jnp.float32), (b, 1, n))
        how = {"columns_last": self.columns_last, "result": jnp.dtype(problem.result), "interpret": self.interpret}
        return problem.restored(int8_product(x.codes, codes, rows, columns, problem.w.layer, **how))


class Int8Layer(Int8Blocks):
    """Few rows by one of the layers of a stack, which is read at the bandwidth of the memory.

    XLA takes the layer out of the stack within its product. Estimates for [8, 4096] x [4096, 14336] on a v5e, in
    thousand cycles: 153 by XLA, 108 by the kernel, which is what reading takes; for 64 rows 163 and 111.
    """

    chips = ()

    @classmethod
    def _is_for(cls, problem: Product) -> bool:
        """As for `Int8Blocks`."""
        return problem.rows <= _FEW and problem.w.layer is not None


def _columns(w: QTensor, axes: Axes) -> jax.Array | None:
    """The scales of a weight, [layers * B or B, 1, N], if its last axis has the columns and one scale for each."""
    if axes.batch + axes.contract + axes.rows != tuple(range(w.ndim)) or len(axes.rows) != 1:
        return None
    if math.prod(w.scale.shape) != math.prod(w.shape[i] for i in axes.batch + axes.rows):
        return None
    return w.in_stack(scale_values(w.scale).astype(jnp.float32)).reshape(-1, 1, w.shape[-1])


def _blocks(m: int, k: int, n: int) -> tuple[int, int] | None:
    """Rows and columns of a block, of equal blocks: as many columns as fit in memory; None if none fit."""
    for most_columns in _COLUMNS:
        for most_rows in _ROWS:
            bm, bn = (
                -(-size // -(-size // most) // tile) * tile
                for size, most, tile in ((m, most_rows, 32), (n, most_columns, 128))
            )
            if 2 * k * (bm + bn) + 12 * bm * bn <= MEMORY:
                return bm, bn
    return None


def int8_product(
    x: jax.Array,
    codes: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    layer: jax.Array | None = None,
    *,
    columns_last: bool,
    result: Any,
    interpret: bool = False,
) -> jax.Array:
    """``rows * columns * (x @ codes)``, with sums in int32 and scaled in float32.

    Args:
      x: int8 [B, M, K].
      codes: int8 [L B, N, K], a stack of L layers; [L B, K, N] if ``columns_last``.
      rows, columns: float32 [B, M, 1] and [L B, 1, N], or [B, 1, N] of the layer.
      layer: the index in the stack; None is the first. The kernel reads the layer without a copy.
      columns_last: see ``codes``.
      result: the dtype of the result.
      interpret: run in Pallas' interpreter.

    Returns:
      [B, M, N].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, m, k), n = x.shape, columns.shape[2]
    blocks = _blocks(m, k, n)
    assert blocks is not None
    bm, bn = blocks
    first = jnp.zeros(1, jnp.int32) if layer is None else jnp.reshape(layer * b, 1).astype(jnp.int32)

    def kernel(first: Any, x: Any, w: Any, rows: Any, columns: Any, out: Any) -> None:
        del first
        axes = ((1,), (0 if columns_last else 1,)), ((), ())
        sums = lax.dot_general(x[...], w[...], axes, preferred_element_type=jnp.int32)
        out[...] = (sums.astype(jnp.float32) * rows[...] * columns[...]).astype(out.dtype)

    def weight(e: Any, j: Any, i: Any, first: Any) -> tuple[Any, ...]:
        del i
        return (first[0] + e, 0, j) if columns_last else (first[0] + e, j, 0)

    def scale(e: Any, j: Any, i: Any, first: Any) -> tuple[Any, ...]:
        del i
        return (first[0] + e if columns.shape[0] == codes.shape[0] else e), 0, j

    made = shape_like(x, (b, m, n), result)
    return pl.pallas_call(
        kernel,
        out_shape=made,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(n, bn), pl.cdiv(m, bm)),
            in_specs=[
                pl.BlockSpec((None, bm, k), lambda e, j, i, first: (e, i, 0)),
                pl.BlockSpec((None, k, bn) if columns_last else (None, bn, k), weight),
                pl.BlockSpec((None, bm, 1), lambda e, j, i, first: (e, i, 0)),
                pl.BlockSpec((None, 1, bn), scale),
            ],
            out_specs=pl.BlockSpec((None, bm, bn), lambda e, j, i, first: (e, i, j)),
        ),
        interpret=interpret,
        compiler_params=compiler_params(LIMIT, order=("parallel",) * 3, interpret=interpret),
        cost_estimate=product_cost(x, codes, (rows, columns), made, layers=codes.shape[0] // b),
        name=Int8Blocks.name,
    )(first, x, codes, rows, columns)
