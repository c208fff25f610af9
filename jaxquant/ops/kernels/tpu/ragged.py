"""Ragged products on a TPU: experts' codes are read by the rows that have chosen them, and decoded on the chip.

    y[m, n] = u[m] sum_g s[e, g, n] sum_{k in g} x[m, k] (c[e, k, n] - z[e, g, n]),    e the expert of row m

Rows are cut into tiles. A step of the grid multiplies one tile with a block of columns of one expert that has rows in
it, and keeps the results of these rows. Steps are in the order of rows, so that consecutive steps share a tile or an
expert. An expert without rows is not read. Without this kernel XLA:TPU writes decoded experts to memory, and transposes
int8 experts: 5.0 ms for 8 rows by 8 experts of 4096 x 14336 in int8 on a v5e, where reading the codes takes 0.57 ms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.codec import values_of
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.types import Index
from jaxquant.ops.kernels import dequantized
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.kernels.ragged import Int8Ragged
from jaxquant.ops.kernels.tpu.activation import repeated
from jaxquant.ops.kernels.tpu.cost import product_cost
from jaxquant.ops.kernels.tpu.decode import BLOCK, Decoder, decoder, scale_of
from jaxquant.ops.kernels.tpu.grouped import GathersBytes, weight_arrays, weight_groups
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.loops import dot, lanes, looped
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like
from jaxquant.ops.kernels.tpu.scales import in_blocks, row_of_blocks
from jaxquant.ops.kernels.tpu.undivided import run_undivided
from jaxquant.ops.problem import Kernel, RaggedProduct
from jaxquant.ops.trained import is_in_training

__all__ = ["ByteExperts", "RaggedExperts", "Steps", "ragged_product"]

_ROWS = 128
"""Rows of a tile, at most: the matrix unit loads weights in the time that it multiplies so many rows."""


def _tile(rows: int, groups: Groups, result: DTypeLike) -> tuple[int, bool]:
    """The rows of a tile, and whether sums of codes are scaled; else values are rounded to bfloat16 and multiplied.

    If a block holds several groups, each row is repeated for each of them, so that one product gives the sums of all.
    """
    most = _ROWS // groups.in_block
    summed = groups.in_block == 1 or rows <= most or result != jnp.bfloat16 or groups.decoder.parts > 1
    return min(-(-rows // 16) * 16, most if summed else _ROWS), summed


@dataclasses.dataclass(frozen=True)
class RaggedExperts(Kernel[RaggedProduct]):
    """A ragged product of experts, with rows of bfloat16, or of int8 or fp8 with one scale per row.

    Attributes:
      groups: the static properties of the experts.
      rows_last: whether codes are stored as [E, N, K].
    """

    operation = RaggedProduct
    platforms = ("tpu",)
    title = "ragged_experts"
    interpret = False

    groups: Groups
    rows_last: bool

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: stored experts in groups, or of signed integers or fp8 with one scale per channel.

        4-bit floats and tables are taken for as many rows as a tile has: for more, XLA decodes an expert once.
        """
        x, w = problem.x, problem.w
        if (
            not isinstance(w, QTensor)
            or is_in_training(w)
            or not is_default(problem.precision)
            or not _takes_rows(problem)
        ):
            return None
        if w.permutation is not None or w.offset is not None or w.scale.shape[0] != w.shape[0]:
            return None
        k, n = w.shape[-2:]
        if not all(isinstance(v, int) for v in (*x.shape, *w.shape)) or k % BLOCK or n < BLOCK:
            return None
        if w.split == -2:
            groups, rows_last = cls._groups(w, problem.dtype), False
        else:
            groups, rows_last = _whole(w), w.minor == (-2,)
        if groups is None or (groups.decoder.parts > 1 and x.shape[0] > _ROWS):
            return None
        return cls(groups, rows_last) if _columns(k, n, groups) else None

    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        """The static properties of experts in groups; None if the kernel does not take them."""
        return weight_groups(w, dtype)

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`; if XLA partitions the program over several devices, by a product that it partitions."""
        plain = Int8Ragged.takes(problem) or dequantized.Float.takes(problem)
        assert plain is not None
        return run_undivided(problem, self._undivided, plain.run)

    def _undivided(self, problem: RaggedProduct) -> jax.Array:
        x, w, rows = problem.x, problem.weight, None
        if isinstance(x, QTensor) and x.scale.shape[1] == 1:
            rows = jnp.broadcast_to(scale_values(x.scale).astype(jnp.float32), (x.shape[0], 1))
            x = x.logical_codes() if x.type.kind == "int" else values_of(x.logical_codes(), x.type)
        elif isinstance(x, QTensor):
            x = x.dequantize(jnp.bfloat16)
        if self.groups.decoder.kind != "integers":
            x = x.astype(jnp.bfloat16)
        if w.split is not None:
            arrays = weight_arrays(w)
            columns = arrays.pop("columns")
            assert arrays.pop("offset") is None
        else:
            given = {"codes": w.kept, "scale": scale_values(w.scale).astype(jnp.float32)}
            arrays = {name: w.in_stack(v).reshape(-1, *v.shape[-2:]) for name, v in given.items()}
            arrays, columns = arrays | {"layer": w.layer, "zero": None}, None
        how = {"groups": self.groups, "rows_last": self.rows_last, "result": jnp.dtype(problem.result)}
        return ragged_product(
            x, problem.sizes, **arrays, rows=rows, columns=columns, **how, interpret=self.interpret
        )  # fmt: skip


class ByteExperts(GathersBytes, RaggedExperts):
    """As `RaggedExperts`."""


def _takes_rows(problem: RaggedProduct) -> bool:
    """Whether the activation is bfloat16, int8 with one scale per row, or a float that is exact in bfloat16."""
    x = problem.x
    if not isinstance(x, QTensor):
        return problem.dtype == jnp.bfloat16
    plain = x.type.signed and x.symmetric and x.permutation is None
    if x.type.kind != "int":
        alone = x.scale.shape[1] == 1 or x.type.scale_format == "e8m0"
        return plain and alone and x.type.kind == "float" and problem.weight.type.kind != "int"
    plain = plain and x.scale.shape[1] == 1
    exact = problem.weight.split is not None or problem.weight.type.kind != "int"
    return plain and (exact or Int8Ragged.takes(problem) is not None)


def _whole(w: QTensor) -> Groups | None:
    """The static properties of signed experts with one scale per channel; None for others."""
    plain = w.symmetric and w.type.signed and w.split is None and w.scale.shape[1:] == (1, w.shape[2])
    native = w.type.kind == "float" and w.kept.dtype == jnp.dtype(w.type.element or "int8")
    if plain and native and w.minor in ((), (-2,)):
        return Groups(w.shape[1], decoder(w.type))
    stored = (w.in_int4 and w.minor == ()) or (w.kept.dtype == jnp.int8 and w.minor in ((), (-2,)))
    return Groups(w.shape[1], Decoder("integers")) if plain and stored and w.type.kind == "int" else None


def _columns(k: int, n: int, groups: Groups) -> int:
    """Columns of a block: as many as fit in memory twice, with sums of a tile; 0 if none fit."""
    most = -(-n // BLOCK) * BLOCK
    for bn in (1024, 512, 256, 128):
        if (2 * k + 12 * k // groups.size + 16 * _ROWS) * min(bn, most) + 4 * _ROWS * k <= MEMORY // 2:
            return min(bn, most)
    return 0


class Steps(NamedTuple):
    """The steps of the grid along the rows, int32, each an array of one entry per step but for the last.

    Attributes:
      expert: the expert, 0 .. E - 1.
      tile: the tile of rows.
      start, end: the rows of the expert; none where rows have no expert.
      number: how many steps there are, [1].
    """

    expert: jax.Array
    tile: jax.Array
    start: jax.Array
    end: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, sizes: jax.Array, rows: int, tile: int) -> Steps:
        """One step for every tile and every expert with rows in it, and for every tile with rows that have none."""
        experts = sizes.shape[0]
        ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
        ends = jnp.append(ends, rows)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        counts = jnp.where(ends > starts, (ends - 1) // tile - starts // tile + 1, 0)
        upto = jnp.cumsum(counts)
        step = jnp.minimum(jnp.arange(-(-rows // tile) + experts), upto[-1] - 1)
        group = jnp.sum(upto[None] <= step[:, None], axis=1)
        first = (upto - counts)[group]
        # Rows without an expert take no other expert's codes into memory.
        last = jnp.max(jnp.where(counts[:-1] > 0, jnp.arange(experts), 0))
        expert = jnp.where(group == experts, last, group)
        start, end = starts[group], jnp.where(group == experts, starts[group], ends[group])
        at = starts[group] // tile + step - first
        return cls(*(v.astype(jnp.int32) for v in (expert, at, start, end, upto[-1:])))


_Numbers = Callable[[jax.Array, DTypeLike], jax.Array]
"""Codes and a dtype -> their numbers in it."""


@functools.partial(jax.jit, static_argnames=("groups", "rows_last", "result", "interpret"))
def ragged_product(
    x: jax.Array,
    sizes: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    groups: Groups,
    rows_last: bool = False,
    zero: jax.Array | None = None,
    rows: jax.Array | None = None,
    columns: jax.Array | None = None,
    layer: jax.Array | None = None,
    result: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """The product, with sums in float32, or in int32 where both sides are integers with one scale per channel.

    Args:
      x: [M, K], int8 or bfloat16; K is a multiple of 128.
      sizes: [E], rows of each expert, in order.
      codes: [L E, K / 128, 128, N], a stack of L layers in the form that `laid_out` stores; without groups
        [L E, K, N], or [L E, N, K].
      scale, zero: [L E, groups of K, N], or [E, groups of K, N] of the layer; zero may be None.
      groups: the rest of the experts.
      rows_last: whether codes are [L E, N, K].
      rows: float32 [M, 1], factors of the rows of x; None is 1.
      columns: float32 [L E or E, 1, N or 1], further factors of the columns; None is 1.
      layer: the index in the stack; None is the first. The kernel reads the layer without a copy.
      result: the dtype of the result.
      interpret: run in Pallas' interpreter.

    Returns:
      [M, N]; rows without an expert are 0.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (m, k), n, experts = x.shape, scale.shape[-1], sizes.shape[0]
    x = _in_order(x, groups.decoder.parts)
    (bm, summed), bn = _tile(m, groups, result), _columns(k, n, groups)
    steps, by_block = Steps.of(sizes, m, bm), summed and codes.ndim == 4
    first = jnp.zeros(1, jnp.int32) if layer is None else jnp.reshape(layer * experts, 1).astype(jnp.int32)
    given = {"scale": scale, "zero": zero, "columns": columns, "rows": rows}
    arrays = {name: v for name, v in given.items() if v is not None}

    def weight(j: Index, t: Index, first: jax.Ref, expert: jax.Ref, *_: jax.Ref) -> tuple[Index, ...]:
        at = first[0] + expert[t]
        return (at, j, 0) if rows_last else (at, *(0,) * (codes.ndim - 2), j)

    specs = {name: _of_expert(v, bn, stacked=v.shape[0] == codes.shape[0]) for name, v in arrays.items()}
    specs["rows"] = pl.BlockSpec((bm, 1), lambda j, t, first, expert, tile, *_: (tile[t], 0))
    block = (None, bn, k) if rows_last else (None, *codes.shape[1:-1], bn)
    made = shape_like(x, (m, n), result)
    return pl.pallas_call(
        functools.partial(_kernel, tuple(arrays), groups, summed, rows_last, interpret),
        out_shape=made,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(steps),
            grid=(pl.cdiv(n, bn), steps.tile.size),
            in_specs=[
                pl.BlockSpec((bm, k), lambda j, t, first, expert, tile, *_: (tile[t], 0)),
                pl.BlockSpec(block, weight),
                *(specs[name] for name in arrays),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda j, t, first, expert, tile, *_: (tile[t], j)),
            scratch_shapes=[pltpu.VMEM((bn // BLOCK, scale.shape[1], BLOCK), jnp.float32)] if by_block else [],
        ),
        interpret=interpret,
        compiler_params=compiler_params(LIMIT, interpret=interpret),
        cost_estimate=product_cost(x, codes, arrays.values(), made, layers=codes.shape[0] // experts),
        name=RaggedExperts.title,
    )(first, *steps, x, codes, *arrays.values())


def _of_expert(v: jax.Array, bn: int, *, stacked: bool) -> Any:
    """The block of a step's expert in an array of the stack, or of the layer: for these columns, or for all."""
    from jax.experimental import pallas as pl

    one = v.shape[-1] == 1

    def place(j: Index, t: Index, first: jax.Ref, expert: jax.Ref, *_: jax.Ref) -> tuple[Index, ...]:
        return expert[t] + (first[0] if stacked else 0), 0, 0 if one else j

    return pl.BlockSpec((None, v.shape[-2], 1 if one else bn), place)


def _in_order(x: jax.Array, parts: int) -> jax.Array:
    """Each 128 elements of rows in the order of decoded codes, `Decoder.parts`."""
    if parts == 1:
        return x
    return jnp.swapaxes(x.reshape(x.shape[0], -1, BLOCK // parts, parts), 2, 3).reshape(x.shape)


def _kernel(
    names: tuple[str, ...],
    groups: Groups,
    summed: bool,
    rows_last: bool,
    interpret: bool,
    first: jax.Ref,
    *refs: Any,
) -> None:
    from jax.experimental import pallas as pl

    del first
    numbers = functools.partial(groups.decoder.numbers, interpret=interpret)
    steps, (x, codes, *rest) = Steps(*refs[:5]), refs[5:]
    of, (out, *scratch), t = dict(zip(names, rest, strict=False)), rest[len(names) :], pl.program_id(1)
    tile, start, end = steps.tile[t], steps.start[t], steps.end[t]

    @pl.when((t == 0) | (tile != steps.tile[jnp.maximum(t - 1, 0)]))
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when((t < steps.number[0]) & (end > start))
    def _() -> None:
        if codes.ndim == 2:
            total = _whole_sums(x, codes, of, numbers, rows_last=rows_last)
        elif summed:
            in_blocks(of["scale"], groups.scale_form, scratch[0])
            total = _block_sums(x, codes, of | {"scale": scratch[0]}, groups, numbers)
        else:
            total = _values(x, codes, of, groups, numbers)
        total = total if groups.decoder.factor == 1 else total * groups.decoder.factor
        for name in ("rows", "columns"):
            total = total * of[name][...] if name in of else total
        row = tile * out.shape[0] + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        out[...] = jnp.where((row >= start) & (row < end), total.astype(out.dtype), out[...])


def _whole_sums(x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], numbers: _Numbers, *, rows_last: bool) -> jax.Array:
    """One product of codes, scaled."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    axes = ((1,), (1 if rows_last else 0,)), ((), ())

    def step(i: Index, total: jax.Array) -> jax.Array:
        w = numbers(codes[:, lanes(i)] if rows_last else codes[lanes(i), :], x.dtype)
        return total + lax.dot_general(x[:, lanes(i)], w, axes, preferred_element_type=sums)

    shape = x.shape[0], of["scale"].shape[1]
    total = looped(x.shape[1] // BLOCK, step, jnp.zeros(shape, sums))
    return total.astype(jnp.float32) * of["scale"][...]


def _block_sums(x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], groups: Groups, numbers: _Numbers) -> jax.Array:
    """A product of codes for each block, whose sums are scaled: exact in int8 and bfloat16."""
    from jax.experimental import pallas as pl

    shift, tile = groups.decoder.shift, x.shape[0]

    def step(i: Index, total: jax.Array) -> jax.Array:
        rows = repeated(x[:, lanes(i)], groups, tile).astype(x.dtype)
        sums = dot(rows, numbers(codes[i], rows.dtype)).astype(jnp.float32)
        wide = jnp.sum(rows.astype(jnp.float32), axis=1, keepdims=True) if shift or "zero" in of else None
        for p in range(groups.in_block):
            at = pl.ds(i * groups.in_block + p if groups.size <= BLOCK else i * BLOCK // groups.size, 1)
            part = sums[p * tile : (p + 1) * tile]
            if wide is not None:
                zero = of["zero"][at, :].astype(jnp.float32) if "zero" in of else 0.0
                part = part - wide[p * tile : (p + 1) * tile] * (zero - shift)
            scale = row_of_blocks(of["scale"], at)
            total = total + (part.reshape(-1, 8, part.shape[1]) * scale[None]).reshape(part.shape)
        return total

    return looped(codes.shape[0], step, jnp.zeros((x.shape[0], codes.shape[2]), jnp.float32))


def _values(x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], groups: Groups, numbers: _Numbers) -> jax.Array:
    """A product of values in bfloat16 for each block, which has several groups."""
    from jax.experimental import pallas as pl

    def by_row(name: str, i: Index) -> jax.Array:
        value = of[name][pl.ds(i * groups.in_block, groups.in_block), :]
        return scale_of(value, groups.scale_form if name == "scale" else "float32")[:, None, :]

    def step(i: Index, total: jax.Array) -> jax.Array:
        value = numbers(codes[i], jnp.float32).astype(jnp.float32)
        value = value.reshape(groups.in_block, groups.size, -1)
        value = value - (by_row("zero", i) - groups.decoder.shift) if "zero" in of else value + groups.decoder.shift
        value = (value * by_row("scale", i)).reshape(BLOCK, -1).astype(jnp.bfloat16)
        return total + dot(x[:, lanes(i)].astype(jnp.bfloat16), value)

    return looped(codes.shape[0], step, jnp.zeros((x.shape[0], codes.shape[2]), jnp.float32))
