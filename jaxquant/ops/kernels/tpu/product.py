"""Kernels for products on a TPU with weights of a scale per group: codes are read once, and decoded on the chip.

    y[m, n] = u[n] sum_g s[g, n] sum_{k in g} x[m, k] (c[k, n] - z[g, n])  +  o[g, n] sum_{k in g} x[m, k]

The number of rows decides between two kernels: `grouped_sums` for few, and `grouped_values` for many.

Estimates of the TPU compiler for a v5e: with few rows sums take as long as reading the codes for integers in groups of
128 (memory bound), 1.4 times as long for mxfp4, 1.7 for nvfp4 and 1.8 for tables (bound by the vector unit); with many
rows values take as long as the bfloat16 product (bound by the matrix unit). For a v6e: 1.5 to 1.8 times as long for
tables, mxfp4 and nvfp4 with few rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.ops.kernels.tpu.activation import DIGITS, FEW, planes_of, rows_of_sums
from jaxquant.ops.kernels.tpu.grid import Body
from jaxquant.ops.kernels.tpu.grouped_sums import Sums
from jaxquant.ops.kernels.tpu.grouped_values import Values
from jaxquant.ops.kernels.tpu.groups import Groups

__all__ = ["body_for", "grouped_product"]


def body_for(rows: int, dtype: DTypeLike, groups: Groups) -> type[Body]:
    """The kernel for so many rows of a dtype."""
    summed = dtype == jnp.int8 and groups.multiplies_integers and groups.in_block == 1
    # Per block and 128 columns, `Sums` scales a register for each 8 of its rows; `Values` scales 16 and adds rows / 8.
    table = min(FEW, FEW // 2 + rows // 2)
    few = DIGITS if groups.multiplies_integers else table if groups.decoder.kind == "table" else FEW
    return Sums if summed or rows_of_sums(rows, dtype, groups) <= few else Values


@functools.partial(jax.jit, static_argnames=("groups", "body", "result", "cores", "interpret"))
def grouped_product(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    groups: Groups,
    body: type[Body],
    zero: jax.Array | None = None,
    offset: jax.Array | None = None,
    rows: jax.Array | None = None,
    columns: jax.Array | None = None,
    layer: jax.Array | None = None,
    result: DTypeLike = jnp.float32,
    cores: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """The product, with sums in float32.

    Args:
      x: [B, M, K], int8, bfloat16 or float32; K is a multiple of 128.
      codes: [L B, K / 128, 128, N], a stack of L layers of B weights in the form that `laid_out` stores.
      scale, zero, offset: [L B, K / group size, N], or [B, K / group size, N] of the layer. The last two may be None.
      groups: the rest of the weight.
      body: the kernel, as `body_for` chooses it.
      rows: float32 [B, M, 1], factors of the rows of x; None is 1.
      columns: float32 [L B or B, 1, N or 1], further factors of the columns; None is 1.
      layer: the index in the stack; None is the first. The kernel reads the layer without a copy.
      result: the dtype of the result.
      cores: the number of cores of the chip.
      interpret: run in Pallas' interpreter.

    Returns:
      [B, M, N].
    """
    if x.dtype == jnp.int8 and not groups.multiplies_integers:
        x = x.astype(jnp.bfloat16)
    m = x.shape[1]
    planes = planes_of(m, x.dtype, groups) if body is Sums else (jnp.dtype(jnp.bfloat16),)
    half = body is Sums and m <= 8 and planes == (jnp.dtype(jnp.bfloat16),) and groups.in_block > 1
    further = "all" if columns is not None and columns.shape[2] == 1 else "columns"
    given = {"scale": scale, "zero": zero, "offset": offset, "rows": rows, further: columns}
    arrays = {name: v for name, v in given.items() if v is not None}
    return body(groups, planes, result, cores, half, interpret)(x, codes, layer, arrays)
