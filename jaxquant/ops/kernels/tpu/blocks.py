"""Rounds arrays to block formats in one pass: values with one power of two for each 32 along the last axis.

XLA moves the elements of a block to another axis, to find the largest of them, and moves scales back. The kernel moves
each row by 1, 2, 4, 8 and 16 elements and takes the larger ones; the first element of each block has the largest then.
A product with zeros and ones, exact for powers of two, gives the scale to all elements of the block. Estimates of the
TPU compiler for [64, 4096] bfloat16 as mxfp8: by XLA 24 thousand cycles on a v5e and 16 on a v6e, by the kernel 8.5 and
6.8; of these more than half is waiting for rows that are moved.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import block_values
from jaxquant.core.observers import AbsMax
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType
from jaxquant.core.sizes import number
from jaxquant.core.specs import QuantSpec
from jaxquant.ops.kernels.tpu.pallas import compiler_params, shape_like
from jaxquant.ops.kernels.tpu.rounding import EXPONENT, power_below, rounded_float
from jaxquant.ops.kernels.tpu.undivided import if_undivided

__all__ = ["in_one_pass", "rounded_blocks"]

_SIZE, _LANES = 32, 128  # elements of a block, and of a row of a register
_BLOCK = 1 << 18  # elements that are in memory at a time, at most
_STRIP = 64  # rows that are rounded together, at most
_TOGETHER = 1 << 16  # and elements
_NAN = 2.0**127  # in place of twice the scale of a block with NaN: larger than all others


def rounded_blocks(x: jax.Array, *, qtype: QType, interpret: bool = False) -> jax.Array:
    """The values of x in a block format, as `quantize` and `dequantize` find them.

    Args:
      x: [M, K], bfloat16 or float32; 128 divides K.
      qtype: mxfp8 or mxfp4.
      interpret: run in Pallas' interpreter.

    Returns:
      [M, K] in x's dtype, exact. Infinities saturate and widen no range; a block with NaN is NaN. Numbers below the
      smallest normal one are 0, as in all that a TPU computes.
    """
    from jax.experimental import pallas as pl

    m, k = x.shape
    rows = min(m, max(_BLOCK // k // 8, 1) * 8)
    strip = min(rows, _STRIP)
    lanes = max(n for n in range(_LANES, max(_TOGETHER // max(strip, 8), _LANES) + 1, _LANES) if k % n == 0)

    def kernel(x: jax.Ref, out: jax.Ref) -> None:
        row, column = (lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), axis) for axis in (0, 1))
        spread = (row == column & -_SIZE).astype(jnp.float32).astype(jnp.bfloat16)

        def several(j: jax.Array, total: int) -> int:
            for i in range(0, rows, strip):
                for first in range(0, lanes, _LANES):
                    at = slice(i, min(i + strip, rows)), pl.ds(pl.multiple_of(j * lanes, _LANES) + first, _LANES)
                    out[at] = _rounded(x[at].astype(jnp.float32), spread, qtype).astype(out.dtype)
            return total

        lax.fori_loop(0, k // lanes, several, 0)

    block = pl.BlockSpec((rows, k), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=shape_like(x, (m, k), x.dtype),
        grid=(pl.cdiv(m, rows),),
        in_specs=[block],
        out_specs=block,
        compiler_params=compiler_params(order=("parallel",), interpret=interpret),
        interpret=interpret,
        name="rounded_blocks",
    )(x)


def _rounded(x: jax.Array, spread: jax.Array, qtype: QType) -> jax.Array:
    """float32 [rows, 128], rounded; ``spread`` is a matrix that repeats the first element of each block."""
    magnitude = jnp.abs(x)
    power = power_below(_largest(jnp.where(magnitude == jnp.inf, 0.0, magnitude)))  # infinity for NaN
    double = jnp.clip(power * 2.0 ** (1 - int(math.log2(qtype.qmax))), 2.0**-125, _NAN)
    double = jnp.where(power == 0, 2.0, double).astype(jnp.bfloat16)
    double = jnp.dot(double, spread, preferred_element_type=jnp.float32)
    v = jnp.clip(x * _reciprocal_of_half(double), -qtype.qmax, qtype.qmax)
    return rounded_float(v, qtype) * jnp.where(double == _NAN, jnp.nan, double * 0.5)


def _reciprocal_of_half(x: jax.Array) -> jax.Array:
    """``2 / x`` for a power of two: all bits of the exponent inverted. (The compiler rejects a difference of bits.)"""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) ^ EXPONENT, jnp.float32)


def _largest(x: jax.Array) -> jax.Array:
    """The largest of each block of 32, in the place of its first element."""
    from jax.experimental.pallas import tpu as pltpu

    for apart in (1, 2, 4, 8, 16):
        x = jnp.maximum(x, pltpu.roll(x, _LANES - apart, 1))
    return x


def _fits(x: jax.Array, q: QTensor, *, spec: QuantSpec, axes: tuple[int, ...]) -> bool:
    """Whether a spec has powers of two for scales, from the largest of each 32 elements along the last axis."""
    del q
    plain = spec.type.scale_format == "e8m0" and spec.type.group_size == _SIZE and type(spec.observer) is AbsMax
    sized = x.ndim >= 2 and all(math.isfinite(number(n)) for n in x.shape) and x.shape[-1] % _LANES == 0
    return plain and sized and axes == (-1,) and x.dtype in (jnp.bfloat16, jnp.float32)


@block_values.on("tpu", when=_fits)
def in_one_pass(x: jax.Array, q: QTensor, *, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """The values of `rounded_blocks`."""
    del axes
    leaves, tree = jax.tree.flatten(q)

    def rounded(x: jax.Array, *_: jax.Array) -> jax.Array:
        return rounded_blocks(x.reshape(-1, x.shape[-1]), qtype=spec.type).reshape(x.shape)

    def divided(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return jax.tree.unflatten(tree, leaves).dequantize(x.dtype)

    return if_undivided(rounded, divided, *lax.stop_gradient((x, *leaves)))
