"""Products of int8 codes with one scale per row on either side, where XLA's own take longer.

    y[m, n] = s[m] t[n] sum_k x[m, k] w[k, n]

A step of the grid multiplies a block of rows with a block of columns over all of K, and scales the sums. Rows change
first, so that a block of the weight is read once.

Estimates of libtpu 0.0.42.1 for a v6e, [M, 4096] x [4096, 4096], in thousand cycles of static schedules, moving
included, beside those of XLA's product: 21 and 24 for 256 rows, 28 and 39 for 512, 50 and 68 for 1024, 87 and 121 for
2048; for 128 rows 20 and 18. Arithmetic at the peak takes 131 for 4096 rows, of which the kernel takes 163: the matrix
unit works in 91 of 100 instructions; loading the first blocks, and each further block of the weight, takes the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.types import Index
from jaxquant.ops.axes import Axes
from jaxquant.ops.forms import Form
from jaxquant.ops.kernels.dequantized import Dequantized
from jaxquant.ops.kernels.integer import Int8, multiplies_integers, overflow_limit
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.kernels.tpu.activation import DIGIT, digits
from jaxquant.ops.kernels.tpu.chips import MULTIPLY_FLOATS_ONLY, V6E
from jaxquant.ops.kernels.tpu.cost import product_cost
from jaxquant.ops.kernels.tpu.dots import is_read_in_product
from jaxquant.ops.kernels.tpu.layout import in_tiles
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.undivided import run_undivided
from jaxquant.ops.kernels.tpu.widths import equal_width, widest
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix

__all__ = ["Bfloat16Layer", "DigitsLayer", "Int8Blocks", "Int8Layer", "int8_product"]

_LEAST = 192
"""The fewest rows for which the kernel takes less time than XLA's product."""

_FEW = 64
"""The most rows for which reading a layer takes longer than multiplying it."""

_ROWS, _COLUMNS = (512, 256), (1024, 512)  # of a block; with 512 columns reading x takes longer than multiplying it


@dataclasses.dataclass(frozen=True)
class Int8Blocks(Kernel[Product]):
    """A product of codes with sums in int32, as `Int8` computes it, to the bit.

    Attributes:
      columns_last: whether codes of the weight are stored as [B, K, N]; else as [B, N, K].
    """

    platforms = ("tpu",)
    chips = (V6E,)  # on a v5e XLA's product takes 1.04 times its arithmetic
    title = "int8_blocks"
    interpret = False

    columns_last: bool

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: many rows of signed int8 on both sides, with a weight that is stored as a matrix."""
        sizes = (*problem.x.shape, *problem.w.shape)
        if not all(isinstance(n, int) for n in sizes) or not multiplies_integers(problem) or not cls._is_for(problem):
            return None
        x, w = problem.forms
        if not isinstance(x, Matrix) or not isinstance(w, Matrix) or x.zero_point is not None or x.groups != 1:
            return None
        return cls._of(problem, w, jnp.int8) if w.shape[2] <= overflow_limit(x.reach, w.reach) else None

    @classmethod
    def _of(cls, problem: Product, w: Form, dtype: DTypeLike) -> Kernel[Product] | None:
        """The kernel for an activation of a dtype, if it takes the weight."""
        if not isinstance(w, Matrix) or w.zero_point is not None or w.groups != 1:
            return None
        if problem.weight.kept.dtype != jnp.int8 or not problem.weight.type.signed:
            return None
        (_, n, k), axes, order = w.shape, problem.w_axes, problem.weight.stored_order
        orders = {axes.order: False, axes.batch + axes.contract + axes.rows: True}
        fits = k % 128 == 0 and n >= 128 and _blocks(int(problem.rows), k, n, dtype) is not None
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
        return self._product(problem, x.codes, w, jnp.broadcast_to(x.scale.astype(jnp.float32), (*x.shape[:2], 1)))

    def _product(self, problem: Product, x: jax.Array, w: Matrix, rows: jax.Array | None) -> jax.Array:
        (b, _, k), n = x.shape, w.shape[1]
        codes = problem.weight.in_stack(problem.weight.kept).reshape(-1, *((k, n) if self.columns_last else (n, k)))
        columns = _columns(problem.weight, problem.w_axes)
        if columns is None:
            columns = jnp.broadcast_to(jnp.swapaxes(w.scale, 1, 2).astype(jnp.float32), (b, 1, n))
        how = {"columns_last": self.columns_last, "result": jnp.dtype(problem.result), "interpret": self.interpret}
        out = int8_product(x, codes, rows, columns, problem.weight.layer, name=self.name, **how)
        return in_tiles(problem.restored(out))


class Int8Layer(Int8Blocks):
    """Few rows by one of the layers of a stack, or by a large weight, read at the bandwidth of the memory.

    XLA takes the layer out of the stack within its product. Estimates for [8, 4096] x [4096, 14336] on a v5e, in
    thousand cycles: 153 by XLA, 108 by the kernel, which is what reading takes; for 64 rows 163 and 111. For a weight
    of [4096, 128256] that is no layer: 1,304 by XLA, 967 by the kernel.
    """

    chips = ()

    @classmethod
    def _is_for(cls, problem: Product) -> bool:
        """As for `Int8Blocks`."""
        return problem.rows <= _FEW and is_read_in_product(problem.weight)


class Bfloat16Layer(Int8Layer):
    """Few rows of bfloat16 by the weights of `Int8Layer`, whose codes are exact in bfloat16.

    Estimates for [8, 4096] x [4096, 14336], in thousand cycles: 181 by XLA and 108 by the kernel on a v5e, which is
    what reading takes, and 85 and 78 on a v6e, where conversions on the vector unit take longer than reading.
    """

    title = "bfloat16_layer"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: as for `Int8Layer`, but with an activation in bfloat16."""
        if isinstance(problem.x, QTensor) or problem.dtype != jnp.bfloat16 or not cls._is_for(problem):
            return None
        return cls._of(problem, problem.forms[1], jnp.bfloat16)

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`; if XLA partitions the program over several devices, by XLA's product."""
        plain = Dequantized.takes(problem)
        assert plain is not None
        return run_undivided(problem, self._undivided, plain.run)

    def _undivided(self, problem: Product) -> jax.Array:
        x, w = problem.matrices()
        return self._product(problem, x.astype(jnp.bfloat16), w, jnp.ones((*x.shape[:2], 1), jnp.float32))


class DigitsLayer(Bfloat16Layer):
    """The same on chips that multiply integers: an activation is two digits in int8, each half of a product's rows.

    Estimates for [8, 4096] x [4096, 14336] on a v6e, in thousand cycles: 64, where reading takes 63. On a v5e 64 rows
    take 112, and 8 as many as in bfloat16.
    """

    title = "digits_layer"

    @classmethod
    def runs_on(cls, target: Target) -> bool:
        """As for `Kernel`."""
        return super().runs_on(target) and target.chip not in MULTIPLY_FLOATS_ONLY

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Bfloat16Layer`, and an activation in float32."""
        if isinstance(problem.x, QTensor) or problem.dtype not in (jnp.bfloat16, jnp.float32):
            return None
        w, fits = problem.forms[1], is_default(problem.precision) and cls._is_for(problem)
        fits = fits and isinstance(w, Matrix) and w.shape[2] <= overflow_limit(127, w.reach)
        return cls._of(problem, w, jnp.float32) if fits else None

    def _undivided(self, problem: Product) -> jax.Array:
        return self._product(problem, *problem.matrices(), None)


def _columns(w: QTensor, axes: Axes) -> jax.Array | None:
    """The scales of a weight, [layers * B or B, 1, N], if its last axis has the columns and one scale for each."""
    if axes.batch + axes.contract + axes.rows != tuple(range(w.ndim)) or len(axes.rows) != 1:
        return None
    if math.prod(w.scale.shape) != math.prod(w.shape[i] for i in axes.batch + axes.rows):
        return None
    return w.in_stack(scale_values(w.scale).astype(jnp.float32)).reshape(-1, 1, w.shape[-1])


def _blocks(m: int, k: int, n: int, dtype: DTypeLike) -> tuple[int, int] | None:
    """Rows and columns of a block, of equal blocks: as many columns as fit in memory; None if none fit.

    ``dtype`` is the activation's, in which codes are multiplied.
    """
    itemsize, few = jnp.dtype(dtype).itemsize, m <= _FEW
    converted = 0 if itemsize == 1 else itemsize
    for most_columns in (widest(k), *_COLUMNS) if few else _COLUMNS:
        for most_rows in _ROWS:
            bm, bn = (
                -(-size // -(-size // most) // tile) * tile
                for size, most, tile in ((m, most_rows, 32), (n, most_columns, 128))
            )
            bn = equal_width(n, most_columns) if few else bn
            if k * (2 * itemsize * bm + (2 + converted) * bn) + 12 * bm * bn <= MEMORY:
                return bm, bn
    return None


def int8_product(
    x: jax.Array,
    codes: jax.Array,
    rows: jax.Array | None,
    columns: jax.Array,
    layer: jax.Array | None = None,
    *,
    columns_last: bool,
    result: DTypeLike,
    name: str = Int8Blocks.title,
    interpret: bool = False,
) -> jax.Array:
    """``rows * columns * (x @ codes)``, with sums in int32 (float32 of bfloat16) and scaled in float32.

    Args:
      x: int8 or bfloat16 [B, M, K]; without ``rows``, bfloat16 or float32, which is written as two digits in int8.
      codes: int8 [L B, N, K], a stack of L layers; [L B, K, N] if ``columns_last``.
      rows: float32 [B, M, 1], or None.
      columns: float32 [L B, 1, N], or [B, 1, N] of the layer.
      layer: the index in the stack; None is the first. The kernel reads the layer without a copy.
      columns_last: see ``codes``.
      result: the dtype of the result.
      name: the kernel's name in the program.
      interpret: run in Pallas' interpreter.

    Returns:
      [B, M, N].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, m, k), n = x.shape, columns.shape[2]
    blocks = _blocks(m, k, n, x.dtype if rows is not None else jnp.float32)
    assert blocks is not None
    bm, bn = blocks
    first = jnp.zeros(1, jnp.int32) if layer is None else jnp.reshape(layer * b, 1).astype(jnp.int32)
    beside = {"columns": columns} if rows is None else {"rows": rows, "columns": columns}

    def weight(e: Index, j: Index, i: Index, first: jax.Ref) -> tuple[Index, ...]:
        del i
        return (first[0] + e, 0, j) if columns_last else (first[0] + e, j, 0)

    def scale(e: Index, j: Index, i: Index, first: jax.Ref) -> tuple[Index, ...]:
        del i
        return (first[0] + e if columns.shape[0] == codes.shape[0] else e), 0, j

    specs = {
        "rows": pl.BlockSpec((None, bm, 1), lambda e, j, i, first: (e, i, 0)),
        "columns": pl.BlockSpec((None, 1, bn), scale),
    }
    made = shape_like(x, (b, m, n), result)
    return pl.pallas_call(
        functools.partial(_kernel, tuple(beside), columns_last),
        out_shape=made,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(n, bn), pl.cdiv(m, bm)),
            in_specs=[
                pl.BlockSpec((None, bm, k), lambda e, j, i, first: (e, i, 0)),
                pl.BlockSpec((None, k, bn) if columns_last else (None, bn, k), weight),
                *(specs[name] for name in beside),
            ],
            out_specs=pl.BlockSpec((None, bm, bn), lambda e, j, i, first: (e, i, j)),
        ),
        interpret=interpret,
        compiler_params=compiler_params(LIMIT, order=("parallel",) * 3, interpret=interpret),
        cost_estimate=product_cost(x, codes, beside.values(), made, layers=codes.shape[0] // b),
        name=name,
    )(first, x, codes, *beside.values())


def _kernel(names: tuple[str, ...], columns_last: bool, first: jax.Ref, x: jax.Ref, w: jax.Ref, *refs: jax.Ref) -> None:
    """One block of rows and columns over all of K; ``refs`` are the arrays of these names, and the result."""
    del first
    axes, of, out = (((1,), (0 if columns_last else 1,)), ((), ())), dict(zip(names, refs, strict=False)), refs[-1]

    def sums(x: jax.Array) -> jax.Array:
        summed = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        return lax.dot_general(x, w[...].astype(x.dtype), axes, preferred_element_type=summed).astype(jnp.float32)

    if "rows" in of:
        total = sums(x[...]) * of["rows"][...]
    else:
        one, other, step = digits(x[...].astype(jnp.float32))
        both = sums(jnp.concatenate([one, other]).astype(jnp.int8))
        rows = one.shape[0]
        total = (both[:rows] + both[rows:] * (1 / DIGIT)) * step
    out[...] = (total * of["columns"][...]).astype(out.dtype)
