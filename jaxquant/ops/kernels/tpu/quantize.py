"""Finds ranges and codes of 8 bits in one pass over an array, which XLA reads at least twice.

A block of rows, or of columns, stays in the chip's own memory between the two steps. Estimate of the TPU compiler for
[4096, 4096] bfloat16 to int8 on a v5e: 78 to 87 thousand cycles, bound by the vector unit; XLA takes 473 thousand, and
reading alone 61. To fp8, rows of [512, 4096] take 19 thousand on a v5e and 16 on a v6e; XLA takes 69 and 45. Factors
that an array is multiplied by first, as gradients are by scales, cost 4 thousand for rows and 44 for columns; XLA
writes that product in float32, for 570.

For [14336, 4096], quantized by columns, the kernel takes 309 thousand cycles, and XLA 1,762.

A row may have two axes, the heads of attention and their width. XLA alone quantizes these with the rows last, and its
int8 product takes as long as in bfloat16 then: for [1, 2048, 32, 128] by [32, 128, 4096] on a v5e both take 892
thousand cycles by its own estimate, 441 with the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import as_codes, quantized_by_itself, scaled_codes
from jaxquant.core.arithmetic import divide
from jaxquant.core.granularity import PerChannel
from jaxquant.core.observers import AbsMax
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType
from jaxquant.core.sizes import number
from jaxquant.core.specs import QuantSpec
from jaxquant.ops.kernels.tpu.layout import side_by_side
from jaxquant.ops.kernels.tpu.pallas import LIMIT, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.rounding import rounded_float
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.ops.placed import Parts, on_each_device, quantized_parts
from jaxquant.ops.shardings import leaf_specs

__all__ = [
    "as_qtensor",
    "in_one_pass",
    "quantize_block",
    "quantized_columns",
    "quantized_rows",
    "rows_of_blocks",
    "scaled_in_one_pass",
    "strips_and_pieces",
    "takes_rows",
]

_QTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")

_LONGEST = 1 << 15  # elements of a row, at most

_BLOCK = 1 << 20  # elements of a block of rows, at most

_COLUMN = 1 << 17  # bytes of a column of codes and their numbers, at most: 128 of them are held twice

_STRIP = 32  # rows that are quantized together

_FEW = 512  # the fewest rows of two axes: XLA quantizes fewer without a pass that joins them

_STEPS = 8  # blocks at least, of 32 rows or more: one is moved while another is quantized


def quantized_rows(
    x: jax.Array, times: jax.Array | None = None, *, qtype: QType, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """``codes = round(x times / scale)`` with ``scale = max |x times| / qmax`` of each row, as in `quantize`.

    Args:
      x: [M, K], bfloat16 or float32.
      times: a float32 factor for each column, [1, K]; None: 1.
      qtype: int8, or an 8-bit float.
      interpret: run in Pallas' interpreter.

    Returns:
      Codes [M, K], of floats their patterns, in int8; and float32 scales [M, 1]. Infinities saturate and widen no
      range; a row with NaN has scale NaN.
    """
    from jax.experimental import pallas as pl

    m, k = x.shape
    rows = rows_of_blocks(m, k)

    def kernel(x: jax.Ref, *refs: jax.Ref) -> None:
        *factor, codes, scales = refs
        quantize_block(x, codes, scales, *factor, qtype=qtype, interpret=interpret)

    return pl.pallas_call(
        kernel,
        out_shape=(shape_like(x, (m, k), jnp.int8), shape_like(x, (m, 1), jnp.float32)),
        grid=(pl.cdiv(m, rows),),
        in_specs=[pl.BlockSpec((rows, k), lambda i: (i, 0)), pl.BlockSpec((1, k), lambda i: (0, 0))][: _count(times)],
        out_specs=(pl.BlockSpec((rows, k), lambda i: (i, 0)), pl.BlockSpec((rows, 1), lambda i: (i, 0))),
        compiler_params=compiler_params(order=("parallel",), interpret=interpret),
        interpret=interpret,
        name="quantized_rows",
    )(x, *(() if times is None else (times,)))


def rows_of_blocks(m: int, k: int) -> int:
    """How many rows of [M, K] are quantized at a time."""
    return min(m, max(min(_BLOCK, m * k // _STEPS) // k // 32 * 32, 32))


def strips_and_pieces(rows: int, k: int) -> tuple[list[slice], list[slice]]:
    """The rows and the columns of the parts of a block that stay in registers."""
    columns = next((n for n in (512, 256, 128) if k % n == 0), k)
    strips = [slice(i, min(i + _STRIP, rows)) for i in range(0, rows, _STRIP)]
    return strips, [slice(j, j + columns) for j in range(0, k, columns)]


def quantize_block(
    x: jax.Ref, codes: jax.Ref, scales: jax.Ref, factor: jax.Ref | None = None, *, qtype: QType, interpret: bool
) -> None:
    """Writes what `quantized_rows` returns for the rows of a block, x [rows, K], times a factor [1, K]."""
    from jax.experimental import pallas as pl

    strips, pieces = strips_and_pieces(*x.shape)

    def values(*at: slice) -> jax.Array:
        v = x[at].astype(jnp.float32)
        return v if factor is None else v * factor[:, at[1]]

    odd = jnp.float32(0)
    for strip in strips:
        most = least = jnp.zeros((strip.stop - strip.start, pieces[0].stop), jnp.float32)
        for piece in pieces:
            magnitude = jnp.abs(values(strip, piece))
            finite = jnp.where(magnitude < jnp.inf, magnitude, -1.0)
            most, least = jnp.maximum(most, finite), jnp.minimum(least, finite)
        most, odd = jnp.max(most, axis=1, keepdims=True), jnp.minimum(odd, jnp.min(least))
        scales[strip, :] = scale = _scale(most, jnp.zeros_like(most), qtype)
        for piece in pieces:
            codes[strip, piece] = _codes(values(strip, piece), scale, qtype, interpret)

    @pl.when(odd < 0)
    def _() -> None:  # an infinity, or a NaN
        nan = _reach(values(slice(0, x.shape[0]), slice(0, x.shape[1])), 1)[1]
        scales[...] = jnp.where(nan > 0, jnp.nan, scales[...])


def quantized_columns(
    x: jax.Array, times: jax.Array | None = None, *, qtype: QType, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`quantized_rows` with one scale for each column, [1, K], and a factor for each row, [M, 1]; 32 divides M."""
    from jax.experimental import pallas as pl

    m, k = x.shape
    columns = min(k, max(_BLOCK // m // 128 * 128, 128))
    part = math.gcd(m, 256)

    def kernel(x: jax.Ref, *refs: jax.Ref) -> None:
        *factor, codes, scales = refs

        def values(i: jax.Array) -> tuple[Any, jax.Array]:
            at = (pl.ds(i * part, part), slice(None))
            v = x[at].astype(jnp.float32)
            return at, v * factor[0][at] if factor else v

        def reach(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            most, nan = _reach(values(i)[1], 0)
            return jnp.maximum(found[0], most), jnp.maximum(found[1], nan)

        def write(i: jax.Array, scale: jax.Array) -> jax.Array:
            at, v = values(i)
            codes[at] = _codes(v, scale, qtype, interpret)
            return scale

        nothing = jnp.zeros((1, columns), jnp.float32)
        most, nan = lax.fori_loop(0, m // part, reach, (nothing, nothing))
        scales[...] = scale = _scale(most, nan, qtype)
        lax.fori_loop(0, m // part, write, scale)

    whole, limit = pl.BlockSpec((m, columns), lambda i: (0, i)), LIMIT if m * columns > _BLOCK else None
    return pl.pallas_call(
        kernel,
        out_shape=(shape_like(x, (m, k), jnp.int8), shape_like(x, (1, k), jnp.float32)),
        grid=(pl.cdiv(k, columns),),
        in_specs=[pl.BlockSpec((m, columns), lambda i: (0, i)), pl.BlockSpec((m, 1), lambda i: (0, 0))][
            : _count(times)
        ],
        out_specs=(whole, pl.BlockSpec((1, columns), lambda i: (0, i))),
        compiler_params=compiler_params(limit, order=("parallel",), interpret=interpret),
        interpret=interpret,
        name="quantized_columns",
    )(x, *(() if times is None else (times,)))


def _count(times: jax.Array | None) -> int:
    return 1 if times is None else 2


def _reach(v: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The largest finite magnitude along an axis, and 1.0 where there is a NaN."""
    magnitude = jnp.abs(v)
    most = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0.0), axis=axis, keepdims=True)
    return most, jnp.max(jnp.where(jnp.isnan(v), 1.0, 0.0), axis=axis, keepdims=True)


def _scale(most: jax.Array, nan: jax.Array, qtype: QType) -> jax.Array:
    scale = jnp.maximum(divide(most, qtype.qmax), jnp.finfo(jnp.float32).tiny)
    return jnp.where(nan > 0, jnp.nan, jnp.where(most == 0, 1.0, scale))


def _codes(v: jax.Array, scale: jax.Array, qtype: QType, interpret: bool) -> jax.Array:
    over = divide if interpret else jnp.divide  # XLA would multiply by the reciprocal; Mosaic does not
    v = jnp.clip(over(v, scale), -qtype.qmax, qtype.qmax)
    return (jnp.round(v) if qtype.kind == "int" else _patterns(v, qtype)).astype(jnp.int8)


def _patterns(v: jax.Array, qtype: QType) -> jax.Array:
    """The patterns of the nearest numbers of an 8-bit float, in int32, from -128 to 127."""
    magnitude, least = jnp.abs(rounded_float(v, qtype)), 2.0**qtype.min_exponent
    subnormal, places = magnitude < least, qtype.mantissa_bits
    # Together with the least normal number, a subnormal one has its own bits.
    upper = lax.bitcast_convert_type(jnp.where(subnormal, magnitude + least, magnitude), jnp.int32) >> 23 - places
    first = qtype.min_exponent + 126 << places
    sign = lax.bitcast_convert_type(v, jnp.int32) >> 31 << 7
    return upper - jnp.where(subnormal, first + (1 << places), first) | sign


def _plain(spec: QuantSpec) -> bool:
    """Whether a spec has one scale per channel: the largest magnitude divided by the largest code."""
    plain = spec.symmetric and not spec.whole_range and type(spec.observer) is AbsMax
    return (
        spec.qtype in _QTYPES
        and plain
        and isinstance(spec.granularity, PerChannel)
        and spec.scale_dtype in (None, "float32")
    )


def _kernel_of(
    x: jax.Array, spec: QuantSpec, axes: tuple[int, ...]
) -> Callable[..., tuple[jax.Array, jax.Array]] | None:
    """The kernel for an array: of rows, or of the columns of a matrix; None where none takes it."""
    if not _plain(spec) or x.ndim < 2 or x.dtype not in (jnp.bfloat16, jnp.float32):
        return None
    if not all(math.isfinite(number(n)) for n in x.shape) or x.shape[-1] % 128:
        return None
    if axes == (-1,):
        return quantized_rows if x.shape[-1] <= _LONGEST else None
    if axes == (-2, -1):
        rows, length = math.prod(x.shape[:-2]), math.prod(x.shape[-2:])
        return quantized_rows if rows >= _FEW and length <= _LONGEST else None
    matrix, column = math.prod(x.shape[:-2]) == 1, x.shape[-2] * (x.dtype.itemsize + 1)
    return quantized_columns if axes == (-2,) and matrix and x.shape[-2] % 32 == 0 and column <= _COLUMN else None


def _quantized(x: jax.Array, times: jax.Array | None, spec: QuantSpec, axes: tuple[int, ...]) -> QTensor:
    """Codes of x times its factors, by the kernel for x."""
    kernel = _kernel_of(x, spec, axes)
    assert kernel is not None
    factor = None if times is None else times.reshape((1, -1) if kernel is quantized_rows else (-1, 1))
    matrix = side_by_side(x, len(axes)) if kernel is quantized_rows else x
    codes, scale = kernel(matrix.reshape(-1, matrix.shape[-1]), factor, qtype=spec.type)
    dtype = x.dtype if times is None else times.dtype
    return as_qtensor(codes, scale, jax.ShapeDtypeStruct(x.shape, dtype), spec, axes)


def as_qtensor(
    codes: jax.Array, scale: jax.Array, like: jax.ShapeDtypeStruct, spec: QuantSpec, axes: tuple[int, ...]
) -> QTensor:
    """Codes and scales that a kernel has found, as the QTensor of an array of this shape and dtype."""
    codes = codes if spec.type.kind == "int" else lax.bitcast_convert_type(codes, jnp.uint8)
    shape = tuple(1 if i - len(like.shape) in axes else n for i, n in enumerate(like.shape))
    return QTensor(codes.reshape(like.shape), scale.reshape(shape), None, qtype=spec.qtype, dtype=like.dtype)


def takes_rows(x: jax.Array, spec: QuantSpec, axes: tuple[int, ...]) -> bool:
    """Whether `quantized_rows` quantizes an activation along its last axis."""
    return axes == (-1,) and _kernel_of(x, spec, axes) is quantized_rows


def _fits(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> bool:
    del apart
    return _kernel_of(x, spec, axes) is not None


def _fits_scaled(x: jax.Array, times: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> bool:
    """Whether the factors are float32, and constant where the scales are not."""
    along = tuple(n if i - x.ndim in axes else 1 for i, n in enumerate(x.shape))
    return times.dtype == jnp.float32 and times.shape == along and _kernel_of(x, spec, axes) is not None


@quantized_by_itself.on("tpu", when=_fits)
def in_one_pass(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> QTensor:
    """The QTensor of `quantized_rows` or `quantized_columns`."""

    def divided(x: jax.Array) -> QTensor:
        return quantized_by_itself.plainly(x, spec=spec, axes=axes, apart=apart)

    return if_undivided(lambda x: _quantized(x, None, spec, axes), divided, lax.stop_gradient(x))


@quantized_parts.on("tpu", when=lambda x, *, spec, axes, parts: _fits(x, spec=spec, axes=axes, apart=True))
def in_parts(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], parts: Parts) -> QTensor:
    """`in_one_pass` of the part that each device has."""

    def quantized(x: jax.Array) -> QTensor:
        return as_codes(x, spec, axes)

    made = leaf_specs(jax.eval_shape(quantized, x), parts.cut)
    return on_each_device(quantized, parts.mesh, parts.spec, made)(x)


@scaled_codes.on("tpu", when=_fits_scaled)
def scaled_in_one_pass(x: jax.Array, times: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...]) -> QTensor:
    """`in_one_pass` of the values times factors, which are not written to memory."""

    def divided(x: jax.Array, times: jax.Array) -> QTensor:
        return scaled_codes.plainly(x, times, spec=spec, axes=axes)

    return if_undivided(lambda x, times: _quantized(x, times, spec, axes), divided, *lax.stop_gradient((x, times)))
