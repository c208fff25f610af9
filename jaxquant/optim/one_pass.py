"""One step for a parameter and its 8-bit moments on a TPU, in one kernel that reads and writes them once.

XLA would write both moments and their scales in float32, and look tables up in separate passes. In the kernel a block
of rows stays in the chip's memory from old codes to new codes, and the maps are computed (see `dynamic_maps`).

The vector unit bounds it: on a v5e the step of Adam takes 126 operations for each register of 1024 numbers, four in a
cycle. Lookups of boundaries in tables of 128 lanes would be exact, but take 6 cycles each, which is more than these.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxquant.core.qtensor import QTensor
from jaxquant.ops.kernels.tpu.pallas import compiler_params
from jaxquant.optim import dynamic_maps

__all__ = ["EXACT", "IN_REGISTERS", "Arithmetic", "Hoisted", "Step", "fits", "hoisted", "in_one_pass"]

Step = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""A step of the elements of a parameter, ``(arithmetic, g, *moments) -> (update, moments)``."""


class Arithmetic(NamedTuple):
    """The operations of a step that a chip has in several accuracies.

    Attributes:
      over: the quotient of two numbers.
      root: the square root of a number that is not negative.
    """

    over: Callable[[Any, jax.Array], jax.Array]
    root: Callable[[jax.Array], jax.Array]


def _over(x: Any, y: jax.Array) -> jax.Array:
    from jax.experimental import pallas as pl

    accurate = {"full_range": False} if "full_range" in inspect.signature(pl.reciprocal).parameters else {}
    return x * pl.reciprocal(y, **accurate)


EXACT = Arithmetic(jnp.divide, jnp.sqrt)
IN_REGISTERS = Arithmetic(_over, lambda x: x * lax.rsqrt(jnp.maximum(x, _TINY)))
"""Quotients and roots in a kernel, to a few units in the last place. They have no cases of their own for infinite and
zero denominators, which give NaN, as infinite roots do."""

_BLOCK = 256  # numbers that share a scale
_LEAST = 1 << 16  # fewest numbers of a parameter for which a kernel pays
_ROWS = 128  # rows that are computed together: registers hold them, and all units have work
_WIDEST = 128 * _BLOCK  # most columns of a program: their scales fill a register
_MEMORY = 24 << 20  # bytes of the blocks of a program, including the blocks in transfer
_TINY = float(np.finfo(np.float32).tiny)
_TALLEST = 512  # most rows of a program
_EACH_128 = np.int32(np.uint32(0x80808080).astype(np.int32))


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
    rows = math.prod(shape[:-1])
    return (rows, shape[-1]) if shape[-1] % _BLOCK == 0 and rows >= 32 else (rows * shape[-1] // _BLOCK, _BLOCK)


def in_one_pass(step: Step, g: Any, moments: Sequence[QTensor], *, interpret: bool = False) -> Hoisted:
    """``step(g, *moments)`` in float32, with the new moments quantized.

    Args:
      step: elementwise; other arrays that it uses are float32 scalars.
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
    most = min(rows, max(_MEMORY // each, 32), _TALLEST)
    part = next(r for r in (_ROWS, 64, 32) if r <= most)
    bm = most // part * part
    traced = hoisted(functools.partial(step, IN_REGISTERS), (part, _BLOCK), len(moments))
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

    *numbers, g, moments = args
    (bm, bn), (rows, columns) = block, _matrix(g.shape)
    scalars = jnp.stack([*numbers, jnp.float32(0)])[None]
    types = tuple(m.qtype for m in moments)
    names = sorted(set(types))
    all_maps = np.stack([dynamic_maps.tables(name) for name in names])

    def kernel(scalars: Any, maps: Any, g: Any, *refs: Any) -> None:
        count = len(types)
        old = refs[: 2 * count]
        u, *new = refs[2 * count :]
        given = [scalars[0:1, i : i + 1].reshape(()) for i in range(len(numbers))]
        lane = lax.broadcasted_iota(jnp.int32, (part, bn // _BLOCK), 1)
        entries, nearest = (
            [functools.partial(f, table=_registers(maps, names.index(t)), qtype=t, interpret=interpret) for t in types]
            for f in (dynamic_maps.values, dynamic_maps.codes)
        )

        def one(i: Any, j: Any) -> None:
            here = pl.ds(pl.multiple_of(i * part, part), part)
            at = here, pl.ds(pl.multiple_of(j * _BLOCK, _BLOCK), _BLOCK)
            was = []
            for codes, scale, entry in zip(old[::2], old[1::2], entries, strict=True):
                own = jnp.sum(jnp.where(lane == j, scale[here, :], 0), axis=1, keepdims=True)
                was.append(_by_registers(entry, _less_128(codes[at]), interpret) * own)
            update, becomes = step(*given, g[at].astype(jnp.float32), *was)
            u[at] = update.astype(u.dtype)
            for x, codes, scale, code in zip(becomes, new[::2], new[1::2], nearest, strict=True):
                absmax = _absmax(x)
                unit = x * jnp.where(absmax >= _TINY, IN_REGISTERS.over(1.0, absmax), 0)
                codes[at] = _bytes(_by_registers(code, unit, interpret))
                scale[here, :] = jnp.where(lane == j, absmax, scale[here, :])

        def over_rows(i: Any, _: Any) -> Any:
            lax.fori_loop(0, bn // _BLOCK, lambda j, _: one(i, j) or 0, 0)
            for scale in new[1::2]:
                here = pl.ds(pl.multiple_of(i * part, part), part)
                absmax = scale[here, :]
                scale[here, :] = jnp.where(absmax < jnp.inf, jnp.where(absmax >= _TINY, absmax, 1.0), jnp.nan)
            return 0

        lax.fori_loop(0, bm // part, over_rows, 0)

    wide = pl.BlockSpec((bm, bn), lambda i, j: (i, j))
    scale = pl.BlockSpec((bm, bn // _BLOCK), lambda i, j: (i, j))
    arrays = [a.reshape(rows, -1) for m in moments for a in (m.stored, m.scale)]
    u, *found = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (g.reshape(rows, columns), *arrays)],
        grid=(pl.cdiv(rows, bm), pl.cdiv(columns, bn)),
        in_specs=[
            pl.BlockSpec(scalars.shape, lambda i, j: (0, 0)),
            pl.BlockSpec(all_maps.shape, lambda i, j: (0, 0, 0, 0)),
            wide,
            *(wide, scale) * len(moments),
        ],
        out_specs=[wide, *(wide, scale) * len(moments)],
        input_output_aliases={k: k - 2 for k in range(3, 3 + len(arrays))},
        interpret=interpret,
        compiler_params=compiler_params(_MEMORY + (24 << 20), order=("parallel",) * 2, interpret=interpret),
        name="optimizer_step",
    )(scalars, all_maps, g.reshape(rows, columns), *arrays)
    kept = [
        m.replace(codes=codes.reshape(m.stored.shape), scale=scale.reshape(m.scale.shape))
        for m, codes, scale in zip(moments, found[::2], found[1::2], strict=True)
    ]
    return u.reshape(g.shape), kept


def _less_128(codes: jax.Array) -> jax.Array:
    """uint8 codes less 128, in int32."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(pltpu.bitcast(codes, jnp.int32) ^ _EACH_128, jnp.int8).astype(jnp.int32)


def _bytes(codes: jax.Array) -> jax.Array:
    """The inverse of `_less_128`."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(pltpu.bitcast(codes.astype(jnp.int8), jnp.int32) ^ _EACH_128, jnp.uint8)


def _by_registers(fn: Callable[[jax.Array], jax.Array], x: jax.Array, interpret: bool) -> jax.Array:
    """A function of [8, 128] on every such part."""
    rows, columns = x.shape
    if interpret:  # one equation for all parts
        parts = x.reshape(rows // 8, 8, columns // 128, 128).swapaxes(1, 2)
        return jax.vmap(jax.vmap(fn))(parts).swapaxes(1, 2).reshape(x.shape)
    return jnp.concatenate(
        [
            jnp.concatenate([fn(x[i : i + 8, j : j + 128]) for j in range(0, columns, 128)], axis=1)
            for i in range(0, rows, 8)
        ],
        axis=0,
    )


def _registers(maps: Any, i: int) -> list[jax.Array]:
    return [maps[i, k] for k in range(dynamic_maps.TABLES)]


def _absmax(x: jax.Array) -> jax.Array:
    """The largest magnitude of each row of 256; infinity if one is NaN, which the maximum of two keeps."""
    most = jnp.maximum(jnp.abs(x[:, :128]), jnp.abs(x[:, 128:]))
    return jnp.max(jnp.where(most != most, jnp.inf, most), axis=1, keepdims=True)
