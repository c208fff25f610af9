"""Kernels for products on a TPU with weights of a scale per group: codes are read once, and decoded on the chip.

    y[m, n] = u[n] sum_g s[g, n] sum_{k in g} x[m, k] (c[k, n] - z[g, n])  +  o[g, n] sum_{k in g} x[m, k]

The number of rows decides between two bodies.

`sums`
: with few rows codes are multiplied directly, and scales are applied to the sums. The matrix unit takes 128 rows of the
  weight at a time. If these hold several groups, each row of x is repeated for each group, with zeros in the other
  groups, so that one product gives the sums of all groups. With integer weights, a float x is written as two int8
  digits. Blocks of x may be larger than x: further rows hold nothing, and are not written.

`values`
: with many rows a block of columns is decoded once, with its scales, into the chip's own memory, and all rows of x are
  multiplied with it. One scale of a whole column multiplies its sum instead, so that nothing is rounded.

Estimates of the TPU compiler for a v5e: at few rows `sums` takes as long as reading the codes for integers in groups of
128 (memory bound), 1.4 times as long for mxfp4, 1.7 for nvfp4 and 1.8 for tables (bound by the vector unit); at many
rows `values` takes as long as the bfloat16 product (bound by the matrix unit). For a v6e: 1.5 to 1.8 times as long for
tables, mxfp4 and nvfp4 at few rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.cost import product_cost
from jaxquant.ops.kernels.tpu.decode import BLOCK, RUN, Decoder, scale_of
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like

__all__ = [
    "DIGIT",
    "DIGITS",
    "FEW",
    "Groups",
    "Sums",
    "Values",
    "ValuesInParts",
    "body_for",
    "digits",
    "dot",
    "equal_width",
    "grouped_product",
    "in_blocks",
    "lanes",
    "looped",
    "repeated",
    "row_of_blocks",
    "rows_of_sums",
    "widest",
]

T = TypeVar("T")

FEW = 128
"""The most rows (times terms of x and groups of a block) for which sums of floats and tables are scaled."""

DIGITS = 64
"""The same limit for integers; up to it a bfloat16 x is written as int8 digits."""

DIGIT = 254.0
"""How many times as large the first digit's unit is as the second's."""

_PART = 1024  # the shortest part of K
_WIDTHS = 1024, 512, 256, 128  # the most columns of a block
_CODES = 4096 * 1024  # of a block, if it has more columns
_UNROLLED = 32  # blocks that the compiler schedules together


@dataclasses.dataclass(frozen=True)
class Groups:
    """The static properties of a weight that a kernel depends on.

    Attributes:
      size: elements of a group.
      decoder: decodes codes to numbers.
      scale_form: the dtype of scales; 8-bit floats are given as their patterns.
      integers: whether the chip's matrix unit multiplies integers; else they are multiplied as bfloat16.
    """

    size: int
    decoder: Decoder
    scale_form: str = "float32"
    integers: bool = True

    @property
    def in_block(self) -> int:
        """Groups in a block; 1 if a group is a block or longer."""
        return max(BLOCK // self.size, 1)

    @property
    def multiplies_integers(self) -> bool:
        """Whether codes are multiplied as integers."""
        return self.integers and self.decoder.kind == "integers"

    @property
    def scales_tables(self) -> bool:
        """Whether `values` scales tables, and not what it reads from them: with fewer operations, and rounded once."""
        return self.decoder.kind == "table" and self.decoder.bytewise and self.size % RUN == 0

    @property
    def scales_exactly(self) -> bool:
        """Whether values are exact in bfloat16, so that chips that multiply it scale two in one operation."""
        fractions = {"float8_e8m0fnu": 1, "float8_e4m3fn": 8}.get(self.scale_form, 0)
        if self.decoder.kind == "floats8":
            return self.decoder.bytewise and fractions == 1
        products = np.outer(self.decoder.table, 1 + np.arange(fractions) / 8).astype(np.float32)
        exact = (products.astype(jnp.bfloat16).astype(np.float32) == products).all()
        return bool(self.decoder.bytewise and fractions and exact)

    def in_bytes(self) -> Groups | None:
        """The same, decoded by operations on bytes; None for integers."""
        if self.decoder.kind == "integers":
            return None
        return dataclasses.replace(self, decoder=self.decoder.in_bytes())


def rows_of_sums(rows: int, dtype: DTypeLike, groups: Groups) -> int:
    """The number of rows that `sums` multiplies for ``rows`` rows of x."""
    return rows * groups.in_block * len(_planes(rows, dtype, groups))


def _planes(rows: int, dtype: DTypeLike, groups: Groups) -> tuple[np.dtype, ...]:
    """The dtypes of the terms that x is split into for the matrix unit."""
    if not groups.multiplies_integers:
        return (jnp.dtype(jnp.bfloat16),) * (2 if dtype == jnp.float32 else 1)
    if dtype == jnp.int8:
        return (jnp.dtype(jnp.int8),)
    if dtype == jnp.bfloat16 and 2 * rows * groups.in_block > DIGITS:
        return (jnp.dtype(jnp.bfloat16),)
    return (jnp.dtype(jnp.int8),) * 2


def body_for(rows: int, dtype: DTypeLike, groups: Groups) -> type[_Body]:
    """The kernel for so many rows of a dtype."""
    summed = dtype == jnp.int8 and groups.multiplies_integers and groups.in_block == 1
    # Per block and 128 columns, `sums` scales a register for each 8 of its rows; `values` scales 16 and adds rows / 8.
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
    body: type[_Body],
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
    planes = _planes(m, x.dtype, groups) if body is Sums else (jnp.dtype(jnp.bfloat16),)
    half = body is Sums and m <= 8 and planes == (jnp.dtype(jnp.bfloat16),) and groups.in_block > 1
    further = "all" if columns is not None and columns.shape[2] == 1 else "columns"
    given = {"scale": scale, "zero": zero, "offset": offset, "rows": rows, further: columns}
    arrays = {name: v for name, v in given.items() if v is not None}
    return body(groups, planes, result, cores, half, interpret)(x, codes, layer, arrays)


@dataclasses.dataclass(frozen=True)
class _Body:
    """One of the two kernels.

    Attributes:
      groups: of the weight.
      planes: the dtypes of the terms of x.
      result: the dtype of the result.
      cores: the number of cores of a chip, which share the columns.
      half: whether 8 of the 16 bfloat16 rows of a register are padding of x: only the other 8 are repeated for groups.
      interpret: whether Pallas' interpreter runs it.
    """

    groups: Groups
    planes: tuple[np.dtype, ...]
    result: DTypeLike
    cores: int = 1
    half: bool = False
    interpret: bool = False

    def __call__(
        self, x: jax.Array, codes: jax.Array, layer: jax.Array | None, arrays: dict[str, jax.Array]
    ) -> jax.Array:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        (b, m, k), n = x.shape, codes.shape[3]
        bm, bn, bk = self.blocks(m, k, n)
        count, parts = arrays["scale"].shape[1], k // bk
        first = () if layer is None else (jnp.reshape(layer * b, 1).astype(jnp.int32),)  # known before a block is read

        def of(name: str, v: jax.Array) -> Any:
            if name == "rows":
                return pl.BlockSpec((None, bm, 1), lambda e, j, i, p, *at: (e, i, 0))
            stacked, one = v.shape[0] == codes.shape[0], name == "all"
            place = lambda e, j, i, p, *at: (e + _first(at) if stacked else e, 0, 0 if one else j)  # noqa: E731
            return pl.BlockSpec((None, v.shape[1], 1 if one else bn), place)

        def weight(e: Index, j: Index, i: Index, p: Index, *at: jax.Ref) -> tuple[Index, ...]:
            part = p if parts == 1 else jnp.where(i == 0, p, parts - 1)  # later rows find their values decoded
            return e + _first(at), part, 0, j

        result = shape_like(x, (b, m, n), self.result)
        order = ("parallel", "parallel", "arbitrary", "arbitrary") if self.cores > 1 else None
        return pl.pallas_call(
            functools.partial(self._run, names=tuple(arrays), skipped=len(first), parts=parts),
            out_shape=result,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(first),
                grid=(b, pl.cdiv(n, bn), pl.cdiv(m, bm), parts),
                in_specs=[
                    pl.BlockSpec((None, bm, bk), lambda e, j, i, p, *at: (e, i, p)),
                    pl.BlockSpec((None, bk // BLOCK, BLOCK, bn), weight),
                    *(of(name, v) for name, v in arrays.items()),
                ],
                out_specs=pl.BlockSpec((None, bm, bn), lambda e, j, i, p, *at: (e, i, j)),
                scratch_shapes=[
                    *([pltpu.VMEM((bm, bn), jnp.float32)] if parts > 1 else []),
                    *(pltpu.VMEM(shape, dtype) for shape, dtype in self._scratch(bm, bn, bk, k, count)),
                ],
            ),
            interpret=self.interpret,
            compiler_params=compiler_params(LIMIT, order=order, interpret=self.interpret),
            cost_estimate=product_cost(x, codes, arrays.values(), result, layers=codes.shape[0] // b),
            name=self.name,
        )(*first, x, codes, *arrays.values())

    def _run(self, *refs: jax.Ref, names: tuple[str, ...], skipped: int, parts: int) -> None:
        from jax.experimental import pallas as pl

        x, codes, *rest = refs[skipped:]
        of, out, scratch = dict(zip(names, rest, strict=False)), rest[len(names)], rest[len(names) + 1 :]

        def write(total: jax.Array) -> None:
            whole = not self.summed and _is_of_columns(of)
            factor = self.groups.decoder.factor if self.summed or whole else 1
            total = total if factor == 1 else total * factor
            total = total * scale_of(of["scale"][...], self.groups.scale_form) if whole else total
            for name in ("rows", "columns", "all"):
                total = total * of[name][...] if name in of else total
            out[...] = total.astype(out.dtype)

        if parts == 1:
            write(self._product(x, codes, of, out.shape, scratch))
            return
        sums, part = scratch.pop(0), pl.program_id(3)

        @pl.when(part == 0)
        def _() -> None:
            sums[...] = jnp.zeros(sums.shape, sums.dtype)

        sums[...] += self._product(x, codes, of, out.shape, scratch)

        @pl.when(part == parts - 1)
        def _() -> None:
            write(sums[...])

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        """The product of a block of rows and a block of columns over a part of K, in float32."""
        raise NotImplementedError

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        raise NotImplementedError

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        raise NotImplementedError

    def _parts(self, bm: int, k: int) -> list[int]:
        """The lengths of the parts that K may be cut into, for blocks of so many rows, longest first."""
        del bm
        return [k]

    def _widths(self, m: int, k: int, n: int) -> list[int]:
        """The columns that a block may have."""
        del m, k
        most = n if n < BLOCK else -(-n // BLOCK) * BLOCK
        return [min(width, most) for width in _WIDTHS]

    def fits(self, m: int, k: int, n: int) -> bool:
        """Whether the smallest blocks fit in memory."""
        return self._bytes(*self.blocks(m, k, n), k) <= MEMORY

    def blocks(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """Rows and columns of a program, as many as fit in memory, and the part of K that it sums at a time."""
        rows = 16 if self.planes[0] == jnp.bfloat16 else 8  # of a register; those beyond m hold nothing
        whole = -(-m // rows) * rows
        sides = [(min(bm, whole), bn) for bm in self.row_blocks for bn in self._widths(m, k, n)]
        found = [(*side, bk) for side in sides for bk in self._parts(side[0], k)]
        fitting = [block for block in found if self._bytes(*block, k) <= MEMORY]
        return max(fitting, key=lambda block: (block[0] * block[1], block[1], block[2]), default=found[-1])

    name: ClassVar[str]
    row_blocks: ClassVar[tuple[int, ...]]
    summed: ClassVar[bool]


class Sums(_Body):
    """Multiplies numbers, and scales the sums."""

    name = "grouped_sums"
    summed = True
    row_blocks = (256, 128)

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        found: list[tuple[tuple[int, ...], Any]] = [((bn // BLOCK, count, BLOCK), jnp.float32)]
        if self._prepared:
            found += [((len(self.planes) * bm, k), self.planes[0])]
        if self._spread:
            found += [((k // BLOCK, self._used(bm) * self.groups.in_block, BLOCK), self.planes[0])]
        if self._digits:
            found += [((bm, BLOCK), jnp.float32)]
        return found

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        spread = 2 * FEW * k if self._spread else 0
        return 2 * k * bn + 12 * k // self.groups.size * bn + 8 * bm * k + 16 * bm * bn + spread

    def _widths(self, m: int, k: int, n: int) -> list[int]:
        """As for `_Body`; equal ones."""
        most = widest(k) if m <= DIGITS else _WIDTHS[0]
        return [n] if n < BLOCK else [equal_width(n, width) for width in (most, *_WIDTHS[1:])]

    @property
    def _digits(self) -> bool:
        return self.planes == (jnp.dtype(jnp.int8),) * 2

    @property
    def _spread(self) -> bool:
        """Whether rows are repeated for the groups of a block once, for all columns."""
        return self.planes == (jnp.dtype(jnp.bfloat16),) and self.groups.in_block > 1

    def _used(self, rows: int) -> int:
        """The number of rows of x, out of ``rows``, that are repeated."""
        return rows // 2 if self.half else rows

    @property
    def _prepared(self) -> bool:
        return len(self.planes) > 1 or self.groups.decoder.parts > 1 or self._spread

    def _prepare(self, x: jax.Ref, rows: int, blocks: int, scratch: list[jax.Ref]) -> None:
        """Writes the terms of x in the order in which codes are decoded, and repeats them for groups."""
        activation = scratch[0]
        if self._digits:
            first, second, step = digits(x[...].astype(jnp.float32))
            activation[:rows], activation[rows:] = first.astype(jnp.int8), second.astype(jnp.int8)
            scratch[1][...] = jnp.broadcast_to(step, scratch[1].shape)
            return
        terms, rest = [], x[...].astype(jnp.float32)
        for _ in self.planes:
            terms.append(rest.astype(jnp.bfloat16))
            rest = rest - terms[-1].astype(jnp.float32)
        for i, term in enumerate(terms):
            _in_order(term, self.groups.decoder, activation, i * rows)
        for i in range(blocks if self._spread else 0):
            parts = repeated(activation[:, lanes(i)], self.groups, self._used(rows))
            scratch[1][i] = parts.astype(jnp.bfloat16)

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        from jax.experimental import pallas as pl

        group, decode, in_block = self.groups, self.groups.decoder, self.groups.in_block
        scales = scratch.pop(0)
        in_blocks(of["scale"], group.scale_form, scales)
        rows, activation = shape[0], x
        if self._prepared:
            activation = scratch[0]
            # Each of two cores prepares its own copy, in every step: it cannot tell which of its steps is the first.
            first = (pl.program_id(1) == 0) | (pl.num_programs(2) > 1) | (self.cores > 1)
            pl.when(first)(functools.partial(self._prepare, x, rows, codes.shape[0], scratch))
        planes, shifted = self._used(activation.shape[0]), "zero" in of or decode.shift != 0

        def block(i: Index, total: jax.Array) -> jax.Array:
            given = scratch[1][i] if self._spread else repeated(activation[:, lanes(i)], group, planes)
            dtype = activation.dtype
            numbers = decode.numbers(codes[i], dtype, interpret=self.interpret)
            sums = dot(given.astype(dtype), numbers).astype(jnp.float32)
            wide: Any = None
            if shifted or "offset" in of:
                wide = jnp.sum(given.astype(jnp.float32), axis=1, keepdims=True)
            for p in range(in_block):
                at = pl.ds(i * in_block + p if group.size <= BLOCK else i * BLOCK // group.size, 1)
                scale = row_of_blocks(scales, at)
                here = slice(p * planes, (p + 1) * planes)
                part = sums[here]
                if shifted:
                    zero = of["zero"][at, :].astype(jnp.float32) if "zero" in of else 0.0
                    part = part - wide[here] * (zero - decode.shift)
                part = (part.reshape(-1, 8, part.shape[1]) * scale[None]).reshape(part.shape)
                if "offset" in of:
                    part = part + wide[here] * of["offset"][at, :].astype(jnp.float32)
                total = total + part
            return total

        total = looped(codes.shape[0], block, jnp.zeros((planes, shape[1]), jnp.float32))
        if self._digits:
            total = (total[:rows] + total[rows:] * (1 / DIGIT)) * scratch[1][:, :1]
        elif planes > rows:
            total = total[:rows] + total[rows:]
        return jnp.concatenate([total, jnp.zeros_like(total)], axis=0) if self.half else total


class Values(_Body):
    """Multiplies values, which are decoded once for all rows."""

    name = "grouped_values"
    summed = False
    row_blocks = (512, 256, 128)

    def _scratch(self, bm: int, bn: int, bk: int, k: int, count: int) -> list[tuple[tuple[int, ...], Any]]:
        found: list[tuple[tuple[int, ...], Any]] = [((bn // BLOCK, count, BLOCK), jnp.float32)]
        found += [((k, bn), jnp.bfloat16)] if bm > FEW else []
        return found + ([((bm, bk), jnp.bfloat16)] if self.groups.decoder.parts > 1 else [])

    def _bytes(self, bm: int, bn: int, bk: int, k: int) -> int:
        sums = 4 * bm * bn if bk < k else 0
        return (3 * bk + 2 * k) * bn + 16 * k // self.groups.size * bn + 6 * bm * bk + 12 * bm * bn + sums

    def _product(
        self, x: jax.Ref, codes: jax.Ref, of: dict[str, jax.Ref], shape: tuple[int, int], scratch: list[jax.Ref]
    ) -> jax.Array:
        from jax.experimental import pallas as pl

        group, decode = self.groups, self.groups.decoder
        count, scales = codes.shape[0], scratch.pop(0)
        part = pl.program_id(3)
        start = part * count if scales.shape[1] * group.size > x.shape[1] else 0  # the first block of the part of K

        if not _is_of_columns(of):
            first = (pl.program_id(2) == 0) & (part == 0)
            pl.when(first)(functools.partial(in_blocks, of["scale"], group.scale_form, scales))

        run = BLOCK // decode.parts
        shared = run // group.in_block < 8  # several groups in a register

        def by_row(name: str, i: Index) -> jax.Array:
            """Values of the groups of a block, shaped to multiply [parts, groups, rows of both / 8, 8, columns]."""
            first = (start + i) * group.in_block if group.size <= BLOCK else (start + i) * BLOCK // group.size
            if name == "scale" and not shared:
                rows = [row_of_blocks(scales, pl.ds(first + p, 1)) for p in range(group.in_block)]
                return jnp.stack(rows)[None, :, None]
            value = of[name][pl.ds(first, group.in_block), :]
            value = scale_of(value, group.scale_form if name == "scale" else "float32")
            if not shared:
                return value[None, :, None, None, :]
            row = lax.broadcasted_iota(jnp.int32, (run, value.shape[1]), 0)
            rows = value[:1]
            for p in range(1, group.in_block):
                rows = jnp.where(row >= p * run // group.in_block, value[p : p + 1], rows)
            return rows.reshape(1, 1, -1, 8, rows.shape[1])

        def real(i: Index) -> jax.Array:
            if _is_of_columns(of):
                if "zero" not in of and decode.shift == 0:
                    return decode.numbers(codes[i], jnp.bfloat16, interpret=self.interpret)
                zero = of["zero"][...].astype(jnp.float32) if "zero" in of else 0.0
                value = decode.numbers(codes[i], jnp.float32, interpret=self.interpret) - (zero - decode.shift)
                return value.astype(jnp.bfloat16)
            if group.scales_tables and "offset" not in of:
                starts = [pl.ds(((start + i) * BLOCK + row) // group.size, 1) for row in range(0, BLOCK, RUN)]
                return decode.scaled(codes[i], [row_of_blocks(scales, at) for at in starts], interpret=self.interpret)
            if group.scales_exactly and group.in_block > 1 and "offset" not in of:
                scale = _repeated_scales(scales, (start + i) * group.in_block, group.in_block, run)
                scale = (scale if decode.factor == 1 else scale * decode.factor).astype(jnp.bfloat16)
                value = decode.numbers(codes[i], jnp.bfloat16, interpret=self.interpret)
                return (value.reshape(decode.parts, run, -1) * scale[None]).reshape(value.shape)
            value = decode.numbers(codes[i], jnp.float32, interpret=self.interpret)
            value = value.reshape(decode.parts, 1 if shared else group.in_block, -1, 8, value.shape[1])
            if "zero" in of:
                value = value - (by_row("zero", i) - decode.shift)
            elif decode.shift:
                value = value + decode.shift
            scale = by_row("scale", i)
            value = value * (scale if decode.factor == 1 else scale * decode.factor)
            if "offset" in of:
                value = value + by_row("offset", i)
            return value.reshape(BLOCK, -1).astype(jnp.bfloat16)

        activation = x
        if decode.parts > 1:
            activation = scratch.pop()
            _in_order(x[...], decode, activation, 0)
        if not scratch:  # few rows: a block is multiplied while the next is decoded
            step = lambda i, total: total + dot(activation[:, lanes(i)].astype(jnp.bfloat16), real(i))  # noqa: E731
            return looped(count, step, jnp.zeros(shape, jnp.float32))
        (values,) = scratch

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            def store(i: Index, total: int) -> int:
                values[lanes(start + i), :] = real(i)
                return total

            looped(count, store, 0)

        return dot(activation[...].astype(jnp.bfloat16), values[lanes(start, count), :])


class ValuesInParts(Values):
    """`Values` whose x is in memory for a part of K at a time, so that blocks have as many columns as for a short K.

    On a v6e x would be read for so few columns at a time that reading takes longer than multiplying: for 512 rows of
    [14336, 4096] 324 thousand cycles, 234 in parts. On a v5e it takes 500 as a whole and 574 in parts.
    """

    def _parts(self, bm: int, k: int) -> list[int]:
        """Whole blocks and groups; K is whole with few rows, for which values are not kept."""
        unit = max(self.groups.size, BLOCK)
        counts = range(1, k // _PART + 1) if bm > FEW else ()
        return [k // count for count in counts if k % (count * unit) == 0] or [k]


def widest(k: int) -> int:
    """The most columns of a block for few rows: 1024, or more where K is short."""
    return max(_WIDTHS[0], _CODES // k)


def equal_width(n: int, most: int) -> int:
    """The columns of equal blocks for few rows. They are two or more, since nothing runs while the first is read.

    Estimates for 8 rows of bfloat16 by int4 on a v5e, in thousand cycles: [4096, 3584] takes 14.5 in blocks of 896
    columns and 16.3 in blocks of 1024, [4096, 1024] 5.7 in two and 7.7 in one, [512, 8192] 5.7 in two and 9.5 in eight;
    reading takes 14.3, 4.1 and 4.1.
    """
    count = max(-(-n // most), 2 if n > 2 * BLOCK else 1)
    return -(-n // (count * BLOCK)) * BLOCK


def _is_of_columns(of: Mapping[str, jax.Ref]) -> bool:
    """Whether columns have one scale each, which multiplies their sums."""
    return of["scale"].shape[0] == 1 and "offset" not in of


def _first(at: tuple[jax.Ref, ...]) -> Index:
    """The index in the stack of the layer's first weight; the grid runs over all weights of the layer."""
    return at[0][0] if at else 0


def lanes(i: Index, count: int = 1) -> Any:
    """The elements of ``count`` blocks from the i-th on."""
    from jax.experimental import pallas as pl

    return pl.ds(i * BLOCK if isinstance(i, int) else pl.multiple_of(i * BLOCK, BLOCK), count * BLOCK)


def in_blocks(scale: jax.Ref, form: str, out: jax.Ref) -> None:
    """Writes scales in blocks of 128 columns, from which one load takes a row and repeats it."""
    for j in range(out.shape[0]):
        out[j] = scale_of(scale[:, lanes(j)], form)


def row_of_blocks(blocks: jax.Ref, at: Any) -> jax.Array:
    """A row of the scales that `in_blocks` wrote, eight times."""
    return jnp.concatenate([jnp.broadcast_to(blocks[j, at, :], (8, BLOCK)) for j in range(blocks.shape[0])], axis=1)


def _repeated_scales(blocks: jax.Ref, first: Index, count: int, rows: int) -> jax.Array:
    """``count`` rows of the scales that `in_blocks` wrote, each repeated: [rows, columns]."""
    from jax.experimental import pallas as pl

    found = [row_of_blocks(blocks, pl.ds(first + p, 1)) for p in range(count)]
    each = rows // count
    if each >= 8:
        return jnp.concatenate([v for v in found for _ in range(each // 8)], axis=0)
    row, mixed = lax.broadcasted_iota(jnp.int32, found[0].shape, 0), []
    for start in range(0, count, 8 // each):
        part = found[start]
        for p in range(1, 8 // each):
            part = jnp.where(row >= p * each, found[start + p], part)
        mixed.append(part)
    return jnp.concatenate(mixed, axis=0)


def _in_order(x: jax.Array, decode: Decoder, out: jax.Ref, first: int) -> None:
    """Writes rows of x with each 128 elements in the order of decoded codes, by a product with a permutation."""
    x, rows = x.astype(jnp.bfloat16), slice(first, first + x.shape[0])
    if decode.parts == 1:
        out[rows, :] = x
        return
    row, place = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    order = (row == decode.source(place)).astype(jnp.float32).astype(jnp.bfloat16)
    for i in range(0, x.shape[1], BLOCK):
        out[rows, i : i + BLOCK] = dot(x[:, i : i + BLOCK], order).astype(jnp.bfloat16)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32)


def digits(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x = step * (first + second / DIGIT)``, to 4e-5 of the largest element of a row; integers, and steps [M, 1]."""
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    step = jnp.where(largest == 0, 1.0, jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny))
    scaled = x / step
    first = jnp.clip(jnp.round(scaled), -127, 127)
    second = jnp.clip(jnp.round((scaled - first) * DIGIT), -127, 127)
    return first, second, step


def repeated(x: jax.Array, groups: Groups, rows: int) -> jax.Array:
    """Repeats rows of x for each group of a block, with zeros in the other groups: [groups * rows, 128], in 32 bits."""
    if groups.in_block == 1:
        return x
    wide = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)[:rows]
    lane = groups.decoder.source(lax.broadcasted_iota(jnp.int32, wide.shape, 1)) >> groups.size.bit_length() - 1
    return jnp.concatenate([jnp.where(lane == p, wide, 0) for p in range(groups.in_block)], axis=0)


def looped(count: int, step: Callable[[Index, T], T], start: T) -> T:
    """Applies ``step`` ``count`` times, in an unrolled loop."""
    whole = count - count % _UNROLLED if count > _UNROLLED else 0

    def several(i: jax.Array, total: T) -> T:
        for j in range(_UNROLLED):
            total = step(i * _UNROLLED + j, total)
        return total

    total = lax.fori_loop(0, whole // _UNROLLED, several, start) if whole else start
    for i in range(whole, count):
        total = step(i, total)
    return total
