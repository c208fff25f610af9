"""One step for a parameter and its quantized moments on a TPU, in one kernel that reads and writes them once.

XLA would write the moments and their scales in float32, and look tables up in separate passes. In the kernel a block of
rows stays in the chip's memory from old codes to new codes, and the maps are computed (see `dynamic_maps`).

The vector unit bounds it, by libtpu 0.0.42.1. On a v5e the step of Adam takes 98 operations for each register of 1024
numbers, four in a cycle; moving the numbers takes as long as 91. On a v6e it takes 85, and moving takes as long as 53.
In 4 bits it takes 94 and 75. Gathers among the 128 lanes take none of these operations, but 4 to 8 cycles each of the
units that move numbers between lanes: too many to look maps up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxquant.core.qtensor import QTensor
from jaxquant.ops.kernels.tpu.pallas import compiler_params
from jaxquant.optim import dynamic_maps
from jaxquant.optim.moments import Parameter, StoredMoment
from jaxquant.optim.registers import COLUMNS, LANES, ROWS, TINY, Form, reciprocal

__all__ = [
    "Arithmetic",
    "Arrays",
    "Hoisted",
    "Moment",
    "Numbers",
    "Step",
    "Stepped",
    "fits",
    "hoisted",
    "in_one_pass",
    "of_elements",
]


Number: TypeAlias = float | jax.Array
"""A hyperparameter: a number, or a float32 scalar that is traced."""

Numbers: TypeAlias = Sequence[Number]
Arrays: TypeAlias = Sequence[jax.Array]
Stepped: TypeAlias = tuple[jax.Array, Arrays]
"""An update, and the new moments."""


class Arithmetic(NamedTuple):
    """The operations of a step that a chip has in several accuracies.

    Attributes:
      over: the quotient of two numbers.
      root: the square root of a number that is not negative.
    """

    over: Callable[[jax.Array, jax.Array], jax.Array]
    root: Callable[[jax.Array], jax.Array]


_EXACT = Arithmetic(jnp.divide, jnp.sqrt)
_IN_REGISTERS = Arithmetic(lambda x, y: x * reciprocal(y), lambda x: x * lax.rsqrt(jnp.maximum(x, TINY)))
"""Quotients and roots in a kernel, to a few units in the last place. They have no cases of their own for infinite and
zero denominators, which give NaN, as infinite roots do."""


class Moment(NamedTuple):
    """How a moment follows the gradient: ``m = decay m + gain g``, or ``gain g^2``."""

    decay: Number
    gain: Number
    squared: bool = False

    def next(self, m: jax.Array, g: jax.Array) -> jax.Array:
        new = self.gain * g
        return self.decay * m + (new * g if self.squared else new)


class Step(NamedTuple):
    """A step of the elements of a parameter.

    Attributes:
      moments: how each moment follows the gradient.
      update: ``(arithmetic, units, g, old, new)`` -> the update, for moments in any units: in a kernel those of the
        gains, which saves multiplications. ``old`` and ``new`` are the moments before and after the step.
    """

    moments: tuple[Moment, ...]
    update: Callable[..., jax.Array]


def of_elements(step: Step, g: jax.Array, *old: jax.Array) -> Stepped:
    """The update and the new moments, as they are computed elsewhere."""
    new = tuple(moment.next(m, g) for moment, m in zip(step.moments, old, strict=True))
    return step.update(_EXACT, (1.0,) * len(new), g, old, new), new


def _in_units(step: Step, g: jax.Array, entries: Sequence[jax.Array], own: Sequence[Arrays]) -> Stepped:
    """The update and the new moments, in units of their gains, from entries and scales times `_factors`."""
    new = [
        entry * decayed + (g * g if moment.squared else g)
        for moment, entry, (decayed, _) in zip(step.moments, entries, own, strict=True)
    ]
    old = [entry * scale for entry, (_, scale) in zip(entries, own, strict=True)]
    return step.update(_IN_REGISTERS, [moment.gain for moment in step.moments], g, old, new), new


def _factors(step: Step) -> list[tuple[jax.Array, ...]]:
    """For each moment its gain, and the factors of its scales: for its part of the new moment, and for itself."""
    return [tuple(map(jnp.float32, (m.gain, m.decay / m.gain, 1 / m.gain))) for m in step.moments]


_LEAST = 1 << 16  # fewest numbers of a parameter for which a kernel pays
_WIDEST = 2048  # most columns of a program: eight rows of scales
_MEMORY = 8 << 20  # bytes of the blocks of a program, including the blocks in transfer


def fits(moments: Sequence[StoredMoment]) -> TypeGuard[Sequence[QTensor]]:
    """Whether a parameter is large, and all its moments have 8 or 4 bits in blocks of 128 or 256."""
    quantized = [m for m in moments if isinstance(m, QTensor) and m.size >= _LEAST and m.size % COLUMNS == 0]
    blocks = {_block(m) for m in quantized}
    return len(quantized) == len(moments) and len(blocks) == 1 and blocks <= {LANES, COLUMNS}


def _block(m: QTensor) -> float:
    """The numbers that share a scale."""
    return m.size / m.scale.size


class _Layout(NamedTuple):
    """How a kernel divides a parameter.

    Attributes:
      rows, columns: of the parameter.
      bm, bn: rows and columns of a block of it.
      scales: the rows of scales of a block.
      part: rows that are computed together. In fewer, more time goes by in which the last results are waited for.
    """

    rows: int
    columns: int
    bm: int
    bn: int
    scales: int
    part: int


def _layout(g: Parameter, moments: Sequence[QTensor]) -> _Layout:
    rows, columns = math.prod(g.shape[:-1]), g.shape[-1]
    if columns % COLUMNS or rows < ROWS:
        rows, columns = g.size // COLUMNS, COLUMNS
    bn, block = min(columns, _WIDEST), int(_block(moments[0]))
    bytes_of_row = 2 * bn * sum(2 * n for n in (g.dtype.itemsize, *(m.type.bits / 8 for m in moments)))
    # Blocks of 128 wait longest: for a scale and a maximum in each register.
    many = block == LANES and rows >= 2 * ROWS and 2 * ROWS * bytes_of_row <= 3 * _MEMORY
    part = 2 * ROWS if many else ROWS
    most = min(int(_MEMORY / bytes_of_row), rows)
    whole = [n for n in range(part, most + 1, part) if rows % n == 0]
    return _Layout(rows, columns, max(whole, default=max(most // part, 1) * part), bn, bn // block, part)


def in_one_pass(step: Step, g: Parameter, moments: Sequence[QTensor], *, interpret: bool = False) -> Hoisted:
    """``step`` of g and moments in float32, with the new moments quantized.

    Args:
      step: elementwise; other arrays that it uses are float32 scalars.
      g: float32 or bfloat16, of the shape of the codes.
      moments: moments that `fits` accepts.
      interpret: run in Pallas' interpreter.

    Returns:
      The function, and the scalars, its first arguments. After these it takes g and the moments, and returns the update
      in g's dtype and the moments.
    """
    layout, n = _layout(g, moments), len(moments)
    part = jax.ShapeDtypeStruct((layout.part, LANES), jnp.float32)
    traced = hoisted(lambda *args: (_in_units(step, *args), _factors(step)), part, (part,) * n, ((part,) * 2,) * n)
    return Hoisted(functools.partial(_call, traced.function, layout, interpret), traced.scalars)


class Hoisted(NamedTuple):
    """A function, and the scalars that are its first arguments."""

    function: Callable[..., Any]
    scalars: tuple[jax.Array, ...]


def hoisted(fn: Callable[..., Any], *shapes: Any) -> Hoisted:
    """``fn`` for arrays of these shapes, with the arrays of its closure turned into arguments."""
    traced, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    count = len(traced.consts)

    def function(*arrays: Any) -> Any:
        leaves = jax.tree.leaves(arrays[count:])
        found = jaxpr_as_fun(traced.replace(consts=list(arrays[:count])))(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return Hoisted(function, tuple(map(jnp.asarray, traced.consts)))


def _call(step: Callable[..., Any], layout: _Layout, interpret: bool, *args: Any) -> tuple[jax.Array, list[QTensor]]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    *numbers, g, moments = args
    rows, columns, bm, bn, scales, _ = layout
    names = sorted({m.qtype for m in moments})
    maps = np.stack([dynamic_maps.tables(name) for name in names])
    forms = [Form(m.qtype, int(_block(m)), names.index(m.qtype), interpret) for m in moments]
    arrays = [a for m in moments for a in (m.stored.reshape(rows, -1), m.scale.reshape(rows, -1).T)]
    number = pl.BlockSpec((1, 1), lambda i, j: (0, 0), memory_space=pltpu.SMEM)
    whole = pl.BlockSpec(maps.shape, lambda i, j: (0,) * maps.ndim)
    wide = pl.BlockSpec((bm, bn), lambda i, j: (i, j))
    scale = pl.BlockSpec((scales, bm), lambda i, j: (j, i))
    both = [spec for f in forms for spec in (pl.BlockSpec((bm, bn // f.in_byte), lambda i, j: (i, j)), scale)]
    u, *found = pl.pallas_call(
        functools.partial(_kernel, step, layout, forms, len(numbers)),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (g.reshape(rows, columns), *arrays)],
        grid=(pl.cdiv(rows, bm), pl.cdiv(columns, bn)),
        in_specs=[*[number] * len(numbers), whole, wide, *both],
        out_specs=[wide, *both],
        input_output_aliases={len(numbers) + 2 + k: 1 + k for k in range(len(arrays))},
        interpret=interpret,
        compiler_params=compiler_params(_MEMORY + (24 << 20), order=("parallel",) * 2, interpret=interpret),
        name="optimizer_step",
    )(*(x.reshape(1, 1) for x in numbers), maps, g.reshape(rows, columns), *arrays)
    kept = [
        m.replace(codes=codes.reshape(m.stored.shape), scale=scale.T.reshape(m.scale.shape))
        for m, codes, scale in zip(moments, found[::2], found[1::2], strict=True)
    ]
    return u.reshape(g.shape), kept


def _kernel(step: Callable[..., Any], layout: _Layout, forms: Sequence[Form], count: int, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    n, given = len(forms), [number[0, 0] for number in refs[:count]]
    maps, g, *rest = refs[count:]
    old, (u, *new) = rest[: 2 * n], rest[2 * n :]
    tables = [[maps[form.table, k] for k in range(dynamic_maps.TABLES)] for form in forms]
    zeros = jnp.zeros((layout.part, LANES), jnp.float32)
    factors = step(*given, zeros, [zeros] * n, [[zeros] * 2] * n)[1]
    least = [TINY / unit for unit, *_ in factors]

    def one(i: jax.Array, j: jax.Array) -> None:
        rows = pl.ds(pl.multiple_of(i * layout.part, layout.part), layout.part)
        entries = [form.entries(old[2 * k][rows, form.columns(j)], tables[k]) for k, form in enumerate(forms)]
        scales = COLUMNS // forms[0].block
        blocks = [pl.ds(scales * j + b, 1) for b in range(scales)]
        own = [
            [[form.spread(old[2 * k + 1][at, rows] * factor) for factor in factors[k][1:]] for at in blocks]
            for k, form in enumerate(forms)
        ]
        becomes = []
        for half in range(2):
            at = rows, pl.ds(pl.multiple_of(j * COLUMNS, COLUMNS) + half * LANES, LANES)
            each = [e[half] for e in entries], [o[half % scales] for o in own]
            (update, x), _ = step(*given, g[at].astype(jnp.float32), *each)
            u[at] = update.astype(u.dtype)
            becomes.append(x)
        for k, form in enumerate(forms):
            codes, most = form.codes([x[k] for x in becomes], least[k], tables[k])
            new[2 * k][rows, form.columns(j)] = codes
            for at, absmax in zip(blocks, most, strict=True):
                new[2 * k + 1][at, rows] = form.scale(absmax, factors[k][0], least[k])

    columns: int | jax.Array = layout.bn // COLUMNS
    if layout.columns % layout.bn:  # the last block has fewer
        last = pl.program_id(1) == pl.num_programs(1) - 1
        columns = jnp.where(last, layout.columns % layout.bn // COLUMNS, columns)
    inner = functools.partial(lax.fori_loop, 0, columns)
    lax.fori_loop(0, layout.bm // layout.part, lambda i, _: inner(lambda j, _: one(i, j) or 0, 0), 0)
