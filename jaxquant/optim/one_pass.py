"""One step for a parameter and its 8-bit moments on a TPU, in one kernel that reads and writes them once.

XLA would write both moments and their scales in float32, and look tables up in separate passes. In the kernel a block
of rows stays in the chip's memory from old codes to new codes. The maps are computed instead of looked up: the entries
of a decade are evenly spaced, and twice as many as in the decade below. The exponent of an entry's number, as a float,
is its decade:

    value(2^i + j) = 10^(i - 6) (0.1 + 0.9 (j + 1/2) / 2^i)        i = 0 .. 6, j = 0 .. 2^i - 1

Numbers decode to within 4e-7 of the table. Codes are the nearest, except for values within 3e-5 of a step from the
middle between two entries. Estimates of the TPU compiler, in thousand cycles, for Adam on 4 million parameters on a
v5e: 231 for this kernel, bound by the vector unit; 3,156 for XLA with the tables; 233 for Adam in float32; 92 for
moving gradient, step and states alone. Table lookups, 128 lanes at a time, would add 90.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QTYPES

__all__ = ["Hoisted", "Step", "fits", "hoisted", "in_one_pass"]

Step = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]

_BLOCK = 256  # numbers that share a scale
_LEAST = 1 << 16  # fewest numbers of a parameter for which a kernel pays
_ROWS = 128  # rows that are computed together: registers hold them, and all units have work
_WIDEST = 128 * _BLOCK  # most columns of a program: their scales fill a register
_MEMORY = 24 << 20  # bytes of the blocks of a program, including the blocks in transfer
_TINY = float(np.finfo(np.float32).tiny)
_DECADES = 7


def fits(moments: Sequence[Any]) -> bool:
    """Whether a parameter is large, and all its moments have 8 bits in blocks of 256."""
    return all(
        isinstance(m, QTensor)
        and m.qtype in ("dynamic8", "udynamic8")
        and m.size >= _LEAST
        and m.size == m.scale.size * _BLOCK
        for m in moments
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a kernel for codes of a shape: those of the shape, or one row per block."""
    columns = shape[-1] if shape[-1] % _BLOCK == 0 else _BLOCK
    return math.prod(shape) // columns, columns


def in_one_pass(step: Step, g: Any, moments: Sequence[QTensor], *, interpret: bool = False) -> Hoisted:
    """``step(g, *moments)`` in float32, with the new moments quantized.

    Args:
      step: elementwise, ``(g, *moments) -> (update, moments)``; other arrays that it uses are float32 scalars.
      g: float32 or bfloat16, of the shape of the codes.
      moments: moments that `fits` accepts.
      interpret: run in Pallas' interpreter.

    Returns:
      The function, and the scalars, its first arguments. After these it takes g and the moments, and returns the update
      in g's dtype and the moments.
    """
    rows, columns = _matrix(g.shape)
    bn = min(columns, _WIDEST)
    each = 2 * bn * (2 * g.dtype.itemsize + 2 * len(moments)) + 2 * 4 * len(moments) * 2 * max(bn // _BLOCK, 128)
    bm = min(rows, max(_MEMORY // each // _ROWS * _ROWS, 32), _ROWS)
    part = next(r for r in (_ROWS, 96, 64, 32, bm) if bm % r == 0)
    traced = hoisted(step, (part, _BLOCK), len(moments))
    call = functools.partial(_call, traced.function, (bm, bn), part, interpret)
    return Hoisted(call, traced.scalars)


class Hoisted(NamedTuple):
    """A function, and the scalars that are its first arguments."""

    function: Callable[..., Any]
    scalars: tuple[jax.Array, ...]


def hoisted(step: Step, shape: tuple[int, ...], moments: int) -> Hoisted:
    """``step`` for arrays of a shape, with the arrays of its closure turned into arguments."""
    traced, out = jax.make_jaxpr(step, return_shape=True)(*(jax.ShapeDtypeStruct(shape, jnp.float32),) * (1 + moments))
    count = len(traced.consts)

    def function(*arrays: jax.Array) -> Any:
        found = jaxpr_as_fun(traced.replace(consts=list(arrays[:count])))(*arrays[count:])
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return Hoisted(function, tuple(map(jnp.asarray, traced.consts)))


def _call(
    step: Callable[..., Any], block: tuple[int, int], part: int, interpret: bool, *args: Any
) -> tuple[jax.Array, list[QTensor]]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    *numbers, g, moments = args
    (bm, bn), (rows, columns) = block, _matrix(g.shape)
    scalars = jnp.stack([*numbers, jnp.float32(0)])[None]
    types = tuple(m.qtype for m in moments)

    def kernel(scalars: Any, g: Any, *refs: Any) -> None:
        count = len(types)
        old, (u, *new) = refs[: 2 * count], refs[2 * count :]
        given = [scalars[0:1, i : i + 1].reshape(()) for i in range(len(numbers))]
        lane = lax.broadcasted_iota(jnp.int32, (part, bn // _BLOCK), 1)

        def one(i: Any, j: Any) -> None:
            here = pl.ds(pl.multiple_of(i * part, part), part)
            at = here, pl.ds(pl.multiple_of(j * _BLOCK, _BLOCK), _BLOCK)
            was = []
            for codes, scale, qtype in zip(old[::2], old[1::2], types, strict=True):
                own = jnp.sum(jnp.where(lane == j, scale[here, :], 0), axis=1, keepdims=True)
                was.append(_decoded(codes[at].astype(jnp.int32), qtype) * own)
            update, becomes = step(*given, g[at].astype(jnp.float32), *was)
            u[at] = update.astype(u.dtype)
            for x, codes, scale, qtype in zip(becomes, new[::2], new[1::2], types, strict=True):
                absmax = jnp.max(jnp.where(x != x, jnp.inf, jnp.abs(x)), axis=1, keepdims=True)
                unit = x * jnp.where(absmax >= _TINY, 1 / absmax, 0)
                codes[at] = _codes(unit, qtype).astype(jnp.uint8)
                own = jnp.where(absmax < jnp.inf, jnp.where(absmax >= _TINY, absmax, 1.0), jnp.nan)
                scale[here, :] = jnp.where(lane == j, own, scale[here, :])

        def over_rows(i: Any, _: Any) -> Any:
            return lax.fori_loop(0, bn // _BLOCK, lambda j, _: one(i, j) or 0, 0)

        lax.fori_loop(0, bm // part, over_rows, 0)

    wide = pl.BlockSpec((bm, bn), lambda i, j: (i, j))
    scale = pl.BlockSpec((bm, bn // _BLOCK), lambda i, j: (i, j))
    arrays = [a.reshape(rows, -1) for m in moments for a in (m.stored, m.scale)]
    params: Any = getattr(pltpu, "CompilerParams", None) or getattr(pltpu, "TPUCompilerParams")  # noqa: B009
    u, *found = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (g.reshape(rows, columns), *arrays)],
        grid=(pl.cdiv(rows, bm), pl.cdiv(columns, bn)),
        in_specs=[pl.BlockSpec(scalars.shape, lambda i, j: (0, 0)), wide, *(wide, scale) * len(moments)],
        out_specs=[wide, *(wide, scale) * len(moments)],
        input_output_aliases={k: k - 1 for k in range(2, 2 + len(arrays))},
        interpret=interpret,
        compiler_params=None if interpret else params(vmem_limit_bytes=_MEMORY + (24 << 20)),
        name="optimizer_step",
    )(scalars, g.reshape(rows, columns), *arrays)
    kept = [
        m.replace(codes=codes.reshape(m.stored.shape), scale=scale.reshape(m.scale.shape))
        for m, codes, scale in zip(moments, found[::2], found[1::2], strict=True)
    ]
    return u.reshape(g.shape), kept


def _decoded(codes: jax.Array, qtype: str) -> jax.Array:
    """Entries of a dynamic map, by their places in order."""
    if qtype == "dynamic8":  # -127 .. 128, half a step on
        place = (codes - 127).astype(jnp.float32)
        return _signed(_value(jnp.abs(place) + 0.5), place)
    return _value((codes.astype(jnp.float32) + 1.5) * 0.5)


def _value(place: jax.Array) -> jax.Array:
    """The value at a place among the positive entries: decade i begins at 2^i, and its entries lie half a step on."""
    fraction = lax.bitcast_convert_type(place, jnp.int32) & 0x7FFFFF | 0x3F800000
    unit = jnp.zeros_like(place)
    for i in range(_DECADES):
        unit = jnp.where(place >= 2.0**i, np.float32(10.0 ** (i + 1 - _DECADES)), unit)
    value = unit * ((lax.bitcast_convert_type(fraction, jnp.float32) - 1) * 0.9 + 0.1)
    return jnp.where(place >= 2.0**_DECADES, 1.0, value)


@functools.cache
def _edges(qtype: str) -> tuple[float, ...]:
    """The lower edges of the decades, and of the entry 1."""
    table = np.asarray([v for v in QTYPES[qtype].table if v >= 0], np.float32)
    first = [0, *((2**i - 1) * (1 if qtype == "dynamic8" else 2) for i in range(1, _DECADES + 1))]
    return tuple(float((table[k] + table[k + 1]) / np.float32(2)) for k in first)


def _codes(unit: jax.Array, qtype: str) -> jax.Array:
    """The places of the nearest entries."""
    signed = qtype == "dynamic8"
    steps, magnitude = 1 if signed else 2, jnp.abs(unit) if signed else unit
    *edges, last = _edges(qtype)
    decades, first = jnp.zeros_like(unit), jnp.zeros_like(unit)
    for i, edge in enumerate(edges):
        above = magnitude > edge
        decades = jnp.where(above, np.float32(10.0 ** (_DECADES - 1 - i) / 0.9), decades)
        first = jnp.where(above, float(steps * 2**i), first)
    place = first * jnp.minimum(magnitude * decades + np.float32(8 / 9), 2 - 2.0**-9)  # below the next decade's first
    if not signed:
        place = jnp.where(unit > last, 256.0, place).astype(jnp.int32)
        return jnp.maximum(place - 1, 0)
    return jnp.where(unit > last, 128.0, _signed(place, unit)).astype(jnp.int32) + 127


def _signed(magnitude: jax.Array, sign: jax.Array) -> jax.Array:
    """A nonnegative magnitude with the sign of another number."""
    bits = lax.bitcast_convert_type(sign, jnp.int32) & np.int32(-(1 << 31))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.int32) | bits, jnp.float32)
