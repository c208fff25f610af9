"""Quantizes an activation in the pass that computes it: a norm, or an activation function times a gate.

XLA writes the activation to memory, after a pass that finds the sums of a norm, and the kernel of `quantize` reads it
again. This kernel reads the inputs of the function and writes codes. A block of rows is computed in the chip's own
memory, in strips that stay in registers: once for each sum, and once for the result, which is rounded to the dtype of
the activation. Estimates of the TPU compiler (`benchmarks/produced_activations.py`): 2,048 rows of a norm of 4,096 take
a v5e 36 microseconds and a v6e 27, where reading and writing take 31 and 15, and two programs 188 and 93. SiLU times a
gate of 14,336 takes 179 and 96, where these take 179 and 90, and 445 and 235. The vector unit bounds norms on a v6e.

XLA can also compute a function within a kernel that reads it, where Pallas allows that (``allow_input_fusion``). That
needs blocks smaller than 1 MiB and took longer than two programs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import as_codes
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType
from jaxquant.core.specs import QuantSpec
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.quantize import (
    as_qtensor,
    quantize_block,
    rows_of_blocks,
    strips_and_pieces,
    takes_rows,
)
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.ops.rowwise import Form, RowFunction, produced_codes

__all__ = ["in_one_pass", "produced_rows"]

_LANES = 128
"""Numbers of a row in memory, at least."""

_TILE = 16
"""Rows of an array in memory, at most, where it has one."""


def produced_rows(
    inputs: tuple[jax.Array, ...], like: jax.ShapeDtypeStruct, *, function: RowFunction, qtype: QType, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """`quantized_rows` of the values of a function.

    Args:
      inputs: matrices [M, K], [M, 1], [1, K] or [1, 1], by the forms of the function's inputs; bfloat16 or float32.
      like: the shape [M, K] and the dtype of the activation. It is computed in float32 and rounded to this, once: casts
        before the last value round nothing.
      function: makes the activation.
      qtype: int8, or an 8-bit float.
      interpret: run in Pallas' interpreter.

    Returns:
      As `quantized_rows`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    m, k = like.shape
    rows = _rows(like, inputs, function)
    strips, pieces = strips_and_pieces(rows, k)

    def kernel(*refs: jax.Ref) -> None:
        *given, codes, scales, x = refs
        for strip in strips:

            def read(i: int, piece: slice, strip: slice = strip) -> jax.Array:
                by_row, by_column = _varies(function.inputs[i])
                return given[i][strip if by_row else slice(None), piece if by_column else slice(None)]

            def write(piece: slice, values: jax.Array, strip: slice = strip) -> None:
                shape = strip.stop - strip.start, piece.stop - piece.start
                x[strip, piece] = jnp.broadcast_to(values, shape).astype(like.dtype)

            function.of_pieces(read, write, pieces)
        quantize_block(x, codes, scales, qtype=qtype, interpret=interpret)

    def block(form: Form) -> pl.BlockSpec:
        by_row, by_column = _varies(form)
        shape = rows if by_row else 1, k if by_column else 1
        return pl.BlockSpec(shape, (lambda i: (i, 0)) if by_row else (lambda i: (0, 0)))

    first = inputs[function.inputs.index("rows")]
    return pl.pallas_call(
        kernel,
        out_shape=(shape_like(first, (m, k), jnp.int8), shape_like(first, (m, 1), jnp.float32)),
        grid=(pl.cdiv(m, rows),),
        in_specs=[block(form) for form in function.inputs],
        out_specs=(block("rows"), block("row")),
        scratch_shapes=[pltpu.VMEM((rows, k), like.dtype)],
        compiler_params=compiler_params(LIMIT, order=("parallel",), interpret=interpret),
        interpret=interpret,
        name="produced_rows",
    )(*inputs)


def _rows(like: jax.ShapeDtypeStruct, inputs: tuple[jax.Array, ...], function: RowFunction) -> int:
    """How many rows of [M, K] are computed at a time: as many as are quantized, or as fit in memory; 0 if none do."""
    m, k = like.shape
    of_a_row, of_all = k * (like.dtype.itemsize + 2) + 2 * 4 * _LANES, 0  # x once; codes and scales twice
    for x, form in zip(inputs, function.inputs, strict=True):
        by_row, by_column = _varies(form)
        width = 2 * x.dtype.itemsize * (k if by_column else _LANES)
        of_a_row, of_all = of_a_row + by_row * width, of_all + (not by_row) * _TILE * width
    return min(rows_of_blocks(m, k), max(MEMORY - of_all, 0) // of_a_row // 32 * 32)


def _varies(form: Form) -> tuple[bool, bool]:
    """Whether values of a form are others in each row, and in each column."""
    return form in ("rows", "row"), form in ("rows", "column")


def _fits(
    x: jax.Array, inputs: tuple[jax.Array, ...], *, function: RowFunction, spec: QuantSpec, axes: tuple[int, ...]
) -> bool:
    if not takes_rows(x, spec, axes):
        return False
    like = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    return _rows(like, inputs, function) > 0


@produced_codes.on("tpu", when=_fits)
def in_one_pass(
    x: jax.Array, inputs: tuple[jax.Array, ...], *, function: RowFunction, spec: QuantSpec, axes: tuple[int, ...]
) -> QTensor:
    """The QTensor of `produced_rows`. Where it runs nothing reads x, and XLA leaves out what computes it."""
    shape, dtype, k = x.shape, x.dtype, x.shape[-1]

    def kernel(x: jax.Array, *inputs: jax.Array) -> QTensor:
        del x
        sizes = {"rows": (-1, k), "row": (-1, 1), "column": (1, k), "scalar": (1, 1)}
        flat = tuple(v.reshape(sizes[form]) for v, form in zip(inputs, function.inputs, strict=True))
        like = jax.ShapeDtypeStruct((flat[function.inputs.index("rows")].shape[0], k), dtype)
        codes, scale = produced_rows(flat, like, function=function, qtype=spec.type, interpret=False)
        return as_qtensor(codes, scale, jax.ShapeDtypeStruct(shape, dtype), spec, axes)

    def divided(x: jax.Array, *inputs: jax.Array) -> QTensor:
        del inputs
        return as_codes(x, spec, axes)

    return if_undivided(kernel, divided, *lax.stop_gradient((x, *inputs)))
