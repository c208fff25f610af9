"""Products with quantized weights on a GPU: codes are read once, and decoded in registers.

    y[m, n] = r[m] u[n] sum_k x[m, k] ((grid(c[k, n]) - z[g(k), n]) s[g(k), n] + o[g(k), n])

To apply scales that change along k, XLA alone writes the weight to memory in two bytes per value first, in every layout
of the codes. Here one program per block of the result walks along k: it reads a tile of bytes, decodes the codes in its
registers, and multiplies them by the rows of x in the tensor cores. The weight is the left operand, which tensor cores
take from registers.

The two codes of a byte are neighbours along the axis that is stored last. If that axis is n, even and odd columns are
two products, which are joined in the result; if it is k, even and odd elements of x are multiplied separately and
summed. So codes need not be rearranged.

Where a group is at least as long as a step along k, and rows are few, the scale multiplies the sum of the step, whose
factors are exact. Otherwise the scale multiplies the values, which are rounded to the dtype of x, as in the float
program. Scales that are constant along k multiply the result. With few columns, k is split into parts, whose sums are
added in a second step, if these sums are small compared to the weight.

Edges are masked: no operand is padded or copied. The kernel has not been timed; see `jaxquant.ops.kernels.gpu.tiling`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.partition import partitioned
from jaxquant.ops.kernels.gpu.tiling import Blocks, Decoding, blocks
from jaxquant.ops.kernels.gpu.triton import alike, load, params, shaped, store, told

__all__ = ["Weight", "batched", "product"]

_Refs = Mapping[str, "jax.Ref"]
"""The operands of a kernel after the codes, by name."""

_SHALLOWEST_INT8 = 32  # along k, of one step of a tensor core


class Weight(NamedTuple):
    """A stored weight.

    Attributes:
      codes: [K, N], or [N, K] if ``k_last``; uint8 of two codes along the last axis, or int8, uint8, or int4.
      scale: [G, N or 1], or [N or 1, G]; float, or uint8 patterns of float8_e8m0fnu or float8_e4m3fn, or two in a byte
        as unsigned integers; None if scales are constant along k.
      zero_point, offset: of the same shape, integer and float, or None.
      columns: float32 [N or 1], scales that are constant along k, or None.
      table: float32, the values of a type that is a table, or None.
    """

    codes: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    offset: jax.Array | None
    columns: jax.Array | None
    table: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The body of the kernel, with its static parameters.

    Tiles of the weight are [slices x columns, depth], those of x [depth, slices x rows], and sums [slices x columns,
    slices x rows].

    Attributes:
      w: the weight.
      b: the blocks.
      rows: M.
      dtype: of the factors: float32, bfloat16, float16, or that of the codes of both operands: int8 or float8.
      names: of the operands after x and the codes.
      precision: of the product.
    """

    w: Decoding
    b: Blocks
    rows: int
    dtype: np.dtype
    names: tuple[str, ...]
    precision: lax.PrecisionLike

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 2 if self.w.stored == "nibbles" else 1

    @property
    def steps(self) -> int:
        """Steps along k of one part."""
        return -(-self.w.length // (self.b.parts * self.b.slices * self.b.depth))

    @property
    def scaled_sums(self) -> bool:
        """Whether scales multiply the sum of each step."""
        apart = self.w.group % self.b.depth == 0 and "offset" not in self.names
        return apart and (self.b.rows <= 64 or self.integers)

    @property
    def integers(self) -> bool:
        """Whether the codes of both operands are multiplied as integers."""
        return self.dtype == jnp.int8

    @property
    def patterns(self) -> bool:
        """Whether the codes of both operands are multiplied as float8, and are stored as patterns in uint8."""
        return self.dtype.itemsize == 1 and not self.integers

    def __call__(self, x: jax.Ref, codes: jax.Ref, *rest: jax.Ref) -> None:
        *given, out = rest
        refs = dict(zip(self.names, given, strict=True))
        column, row, part = (pl.program_id(axis) for axis in range(3))
        apart = self.steps * self.b.depth  # slices, along k
        sides = [
            self._flat(column * self.b.columns + plane, self.b.columns // self._sides, self._sides)
            for plane in range(self._sides)
        ]

        def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k = part * (self.b.slices * apart) + i * self.b.depth
            at = [(n, k + apart * n_slice) for n, n_slice in sides]
            slices = k + apart * lax.iota(jnp.int32, self.b.slices)
            products = self._products(refs, x, self._tiles(codes, column, slices), row, slices, at)
            if self.scaled_sums and "scale" in refs:
                scales = (self._scale(refs, n, k, self.b.depth) for n, k in at)
                products = [p.astype(jnp.float32) * s for p, s in zip(products, scales, strict=True)]
            return tuple(total + p for total, p in zip(sums, products, strict=True))

        whole = self.integers and "scale" not in refs
        zero = jnp.zeros((sides[0][0].shape[0], self.b.slices * self.b.rows), jnp.int32 if whole else jnp.float32)
        sums = lax.fori_loop(0, self.steps, step, (zero,) * len(sides))
        for plane, total in enumerate(sums):
            n = column * self.b.columns + plane
            n = n + self._sides * lax.iota(jnp.int32, self.b.columns // self._sides)
            self._write(out, refs, total.astype(jnp.float32), row, n, part)

    @property
    def _sides(self) -> int:
        """1, or 2 if even and odd columns are separate products."""
        return 1 if self.w.k_last else self.planes

    def _flat(self, start: jax.Array, size: int, stride: int) -> tuple[jax.Array, jax.Array]:
        """Indices of rows or columns, repeated for each slice, and the slices."""
        if self.b.slices == 1:
            return start + stride * lax.iota(jnp.int32, size), jnp.zeros(1, jnp.int32)
        at = lax.iota(jnp.int32, self.b.slices * size)
        return start + stride * (at % size), at // size

    def _products(
        self,
        refs: _Refs,
        x: jax.Ref,
        tiles: list[jax.Array],
        row: jax.Array,
        k: jax.Array,
        sides: list[tuple[jax.Array, jax.Array]],
    ) -> list[jax.Array]:
        """The sums of a step, one for each side."""
        if self.w.k_last and self.planes == 2:
            rows = [self._rows_of(x, row, k, plane) for plane in range(2)]
            even, odd = (self._multiplied(refs, t, r, *sides[0]) for t, r in zip(tiles, rows, strict=True))
            return [even + odd]
        rows = self._rows_of(x, row, k, None)
        return [self._multiplied(refs, tile, rows, *side) for tile, side in zip(tiles, sides, strict=True)]

    def _write(
        self, out: jax.Ref, refs: _Refs, total: jax.Array, row: jax.Array, n: jax.Array, part: jax.Array
    ) -> None:
        """Writes the sums of matching slices to the result."""
        m, slices = row * self.b.rows + lax.iota(jnp.int32, self.b.rows), self.b.slices
        if slices > 1:
            total = total.reshape(slices, -1, slices, self.b.rows)
            left, right = (lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 2))
            total = jnp.sum(jnp.sum(jnp.where(left == right, total, 0.0), axis=2), axis=0)
        store_at = m[:, None], n[None, :]
        mask = _both(self._in_m(store_at[0]), self._in_n(store_at[1]))
        if self.b.parts > 1:
            store(out, (part, *store_at), jnp.transpose(total), mask)
            return
        if "columns" in refs:
            one = refs["columns"].shape[0] == 1
            total = total * load(refs["columns"], (n * 0 if one else n,), self._in_n(n))[:, None]
        if "rows" in refs:
            total = total * load(refs["rows"], (m,), self._in_m(m))[None, :]
        store(out, store_at, jnp.transpose(total).astype(out.dtype), mask)

    # -- masks: None where a size is whole blocks ----------------------------------------------------------------------

    def _in_m(self, m: jax.Array) -> jax.Array | None:
        return None if self.rows % self.b.rows == 0 else m < self.rows

    def _in_n(self, n: jax.Array) -> jax.Array | None:
        return None if self.w.columns % self.b.columns == 0 else n < self.w.columns

    def _in_k(self, k: jax.Array, size: int) -> jax.Array | None:
        """The mask along k of an axis of ``size`` elements."""
        whole = self.w.length == self.steps * self.b.slices * self.b.parts * self.b.depth
        return None if whole else k < size

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _rows_of(self, x: jax.Ref, row: jax.Array, k: jax.Array, plane: int | None) -> jax.Array:
        """A tile of the activation: all elements of a step, or the even or odd ones."""
        stride = 1 if plane is None else 2
        m = (row * self.b.rows + lax.iota(jnp.int32, self.b.rows))[None, :, None]
        at = (plane or 0) + stride * lax.iota(jnp.int32, self.b.depth // stride)[None, None, :] + k[:, None, None]
        tile = load(x, (m, at), _both(self._in_m(m), self._in_k(at, self.w.length)))
        tile = lax.bitcast_convert_type(tile, self.dtype) if self.patterns else tile.astype(self.dtype)
        return jnp.transpose(tile.reshape(-1, self.b.depth // stride))

    def _tiles(self, codes: jax.Ref, column: jax.Array, k: jax.Array) -> list[jax.Array]:
        """The codes of a step: one tile, or its two planes. Codes narrower than a byte are unsigned patterns."""
        in_k, in_n = (self.planes, 1) if self.w.k_last else (1, self.planes)
        columns, depth, k = self.b.columns // in_n, self.b.depth // in_k, k // in_k
        n = column * columns + lax.iota(jnp.int32, columns)
        if self.w.k_last:
            n, at = n[None, :, None], lax.iota(jnp.int32, depth)[None, None, :] + k[:, None, None]
        else:
            n, at = n[None, None, :], lax.iota(jnp.int32, depth)[:, None, None] + k[None, :, None]
        mask = _both(self._in_n(n * in_n), self._in_k(at, self.w.length // in_k))
        if self.w.k_last:
            tile = load(codes, (n, at), mask).reshape(-1, depth)
        else:
            tile = jnp.transpose(load(codes, (at, n), mask).reshape(depth, -1))
        if self.w.stored == "int4":
            return [lax.bitcast_convert_type(tile.astype(jnp.int16), jnp.uint16) & 15]
        if self.planes == 1:
            return [tile]
        tile = tile.astype(jnp.uint16)
        return [tile & 15, tile >> 4]

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _multiplied(self, refs: _Refs, tile: jax.Array, rows: jax.Array, n: jax.Array, k: jax.Array) -> jax.Array:
        """The product of one plane of codes, of columns n from k on, and the rows of x."""
        values, depth = self._values(refs, tile), tile.shape[1]
        if "zero_point" in refs:
            z = self._entry(refs["zero_point"], n, k, depth)
            values = values - z.astype(jnp.int32 if self.integers else jnp.float32).astype(values.dtype)
        if "scale" in refs and not self.scaled_sums:
            values = values.astype(jnp.float32) * self._scale(refs, n, k, depth)
            if "offset" in refs:
                values = values + self._entry(refs["offset"], n, k, depth).astype(jnp.float32)
        result, numbers = jnp.int32 if self.integers else jnp.float32, (((1,), (0,)), ((), ()))
        return lax.dot_general(values.astype(self.dtype), rows, numbers, self.precision, result)

    def _values(self, refs: _Refs, tile: jax.Array) -> jax.Array:
        """Grid values of codes, in the dtype that is multiplied."""
        qtype, small = self.w.qtype, self.w.stored != "bytes"
        if self.patterns:
            return lax.bitcast_convert_type(tile, self.dtype)
        if qtype.kind == "float":
            exponents = qtype.bits - 1 - qtype.mantissa_bits
            values = _minifloat(tile, exponents, qtype.mantissa_bits)
            if exponents == 4:  # no infinities: these patterns are numbers and NaN
                values = jnp.where((tile & 127) == 127, jnp.nan, values)
            return values.astype(self.dtype)
        if qtype.kind == "table":
            index = (tile ^ 8) if small else tile
            return load(refs["table"], (index.astype(jnp.int32),), None).astype(self.dtype)
        if not small:
            return tile.astype(self.dtype)
        return _small_integers(tile, 8 if qtype.signed else 0, self.dtype)

    def _entry(self, ref: jax.Ref, n: jax.Array, k: jax.Array, depth: int) -> jax.Array:
        """The entries of columns n from k on: [columns, 1 or depth]; for a depth of 0 [columns, groups]."""
        n, group = n[:, None], self._groups(k)
        one = ref.shape[0 if self.w.k_last else 1] == 1
        index = n * 0 if one else n, group
        mask = _both(self._in_n(n), self._in_k(group, self.w.groups))
        return self._spread(load(ref, index if self.w.k_last else index[::-1], mask), depth)

    def _scale(self, refs: _Refs, n: jax.Array, k: jax.Array, depth: int) -> jax.Array:
        """Scales in float32, shaped as by `_entry`."""
        ref = refs["scale"]
        if self.w.scales == "nibbles":
            at, group = n[:, None], self._groups(k)
            index = (at, group // 2) if self.w.k_last else (group, at // 2)
            mask = _both(self._in_n(at), self._in_k(group, self.w.groups))
            found = (load(ref, index, mask).astype(jnp.int32) >> (4 * ((group if self.w.k_last else at) & 1))) & 15
            return self._spread(found.astype(jnp.float32), depth)
        found = self._entry(ref, n, k, 0)
        if self.w.scales == "e8m0":
            bits = found.astype(jnp.int32)
            power = jnp.where(bits == 0, 1 << 22, bits << 23)  # 2 ** -127 is subnormal
            found = lax.bitcast_convert_type(jnp.where(bits == 255, 0x7FC00000, power), jnp.float32)
        elif self.w.scales == "e4m3":
            found = _minifloat(found, 4, 3)
        return self._spread(found.astype(jnp.float32), depth)

    def _groups(self, k: jax.Array) -> jax.Array:
        """The groups of a step from each k on: [columns, groups]."""
        if self.w.groups == 1:
            return jnp.zeros((1, 1), jnp.int32)
        many = self.b.depth // self.w.group if self.w.group % self.b.depth else 1
        return (k // self.w.group)[:, None] + lax.iota(jnp.int32, many)[None, :]

    def _spread(self, value: jax.Array, depth: int) -> jax.Array:
        """Repeats [columns, groups] to [columns, depth]; a depth of 0 and a single group leave it unchanged."""
        n, groups = value.shape
        if groups == 1 or depth in (0, groups):
            return value
        return jnp.broadcast_to(value[:, :, None], (n, groups, depth // groups)).reshape(n, depth)


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """The conjunction of two masks; None is True everywhere."""
    return a if b is None else b if a is None else a & b


def _minifloat(bits: jax.Array, exponents: int, mantissa: int) -> jax.Array:
    """Values in float32 of patterns of up to 8 bits, by way of float16, which has more bits and a greater bias."""
    wide, sign = bits.astype(jnp.uint16), 1 << (exponents + mantissa)
    shifted = ((wide & sign) << (15 - exponents - mantissa)) | ((wide & (sign - 1)) << (10 - mantissa))
    return lax.bitcast_convert_type(shifted, jnp.float16).astype(jnp.float32) * 2.0 ** (16 - (1 << (exponents - 1)))


def _small_integers(bits: jax.Array, less: int, dtype: DTypeLike) -> jax.Array:
    """Integers from int4 in two's complement, plus 8 and less a constant.

    The codes are put into the last bits of a float's mantissa; the float is the integer plus a power of two, which is
    subtracted.
    """
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(bits ^ 0x4308, jnp.bfloat16) - jnp.bfloat16(128 + less)
    if dtype == jnp.float16:
        return lax.bitcast_convert_type(bits ^ 0x6408, jnp.float16) - jnp.float16(1024 + less)
    return ((bits ^ 8).astype(jnp.int32) - less).astype(dtype)


def batched(
    x: jax.Array,
    w: Weight,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    *,
    rows: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`product` of stacks of matrices, all arrays with one axis more in front; under `jax.vmap` and shardings too.

    Partitions of columns, rows and stacks are kept. If k is partitioned, the partial sums of the devices are added.
    """
    optional = "rows", *Weight._fields[1:]
    given = {name: v for name, v in zip(optional, (rows, *w[1:]), strict=True) if v is not None}
    names = list(given)  # all that is closed over below: arrays would outlive their trace in the rules

    def local(cuts: Mapping[str, int]) -> Callable[..., jax.Array]:
        k = cuts.get("k", 1)
        groups = how.groups // k if how.groups > 1 else 1
        columns = how.columns // cuts.get("n", 1)
        mine = dataclasses.replace(how, length=how.length // k, columns=columns, groups=groups)

        def run(x: jax.Array, codes: jax.Array, *others: jax.Array) -> jax.Array:
            found = dict.fromkeys(optional) | dict(zip(names, others, strict=True))
            rows = found.pop("rows")
            return _stacked(x, Weight(codes, **found), mine, result, dtype, rows, interpret=interpret)

        return run

    def mapped(size: int, is_mapped: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        """The batched function: stacks of weights form a longer stack; activations for one weight are more rows."""
        activations = [i for i in range(len(arrays)) if i == 0 or (i > 1 and names[i - 2] == "rows")]
        weights = [i for i in range(len(arrays)) if i not in activations]
        if any(is_mapped[i] for i in weights):
            each = [
                v if m else jnp.broadcast_to(v[None], (size, *v.shape)) for v, m in zip(arrays, is_mapped, strict=True)
            ]
            out = call(*(v.reshape(-1, *v.shape[2:]) for v in each))
            return out.reshape(size, -1, *out.shape[1:]), True
        several = list(arrays)
        for i in activations:
            v = arrays[i] if is_mapped[i] else jnp.broadcast_to(arrays[i][None], (size, *arrays[i].shape))
            v = jnp.moveaxis(v, 0, 1)
            several[i] = v.reshape(v.shape[0], -1, *v.shape[3:])
        out = call(*several)
        return jnp.moveaxis(out.reshape(out.shape[0], size, -1, out.shape[2]), 1, 0), True

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> jax.Array:
        return partitioned(local, arrays, _axes(how, names, arrays), _pieces(how, arrays[0]), "k")

    call.def_vmap(mapped)
    return call(x, w.codes, *given.values())


def _axes(how: Decoding, names: list[str], arrays: tuple[jax.Array, ...]) -> tuple[list[str], list[str]]:
    """Letters of the axes of operands and result, for `partitioned`."""

    def of(name: str, shape: tuple[int, ...]) -> str:
        if name in ("rows", "table"):
            return "bm" if name == "rows" else "b_"
        if name == "columns":
            return "bn" if shape[1] > 1 else "b_"
        last = "bnk" if how.k_last else "bkn"
        return "".join(letter if size > 1 else "_" for letter, size in zip(last, shape, strict=True))

    given = ["bmk", "bnk" if how.k_last else "bkn"]
    given += [of(name, v.shape) for name, v in zip(names, arrays[2:], strict=True)]
    return given, ["bmn"]


def _pieces(how: Decoding, x: jax.Array) -> dict[str, int]:
    """The number of pieces that an axis can be partitioned into: whole groups and whole bytes."""
    small = how.stored == "nibbles"
    k = how.groups if how.groups > 1 else how.length // (2 if small and how.k_last else 1)
    if how.scales == "nibbles" and how.k_last:
        k = k // 2 if k % 2 == 0 else 1
    halves = not how.k_last and how.columns % 2 == 0 and (small or how.scales == "nibbles")
    n = how.columns // 2 if halves else 1 if how.scales == "nibbles" and not how.k_last else how.columns
    found = {"b": x.shape[0], "m": x.shape[1], "k": k, "n": n}
    return {letter: size for letter, size in found.items() if size > 1}


def _stacked(
    x: jax.Array,
    w: Weight,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    rows: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    one = functools.partial(product, how=how, result=result, dtype=dtype, stacked=x.shape[0], interpret=interpret)
    if x.shape[0] == 1:
        first = jax.tree.map(lambda v: v[0], (x, w, rows))
        return one(first[0], first[1], rows=first[2])[None]
    return jax.vmap(lambda x, w, rows: one(x, w, rows=rows))(x, w, rows)


def product(
    x: jax.Array,
    w: Weight,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    *,
    rows: jax.Array | None = None,
    stacked: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """The product of an activation and the values of a weight.

    Args:
      x: [M, K]: bfloat16, float16 or float32, or codes in int8 or patterns of float8 in uint8.
      w: the weight, with groups of a multiple of 16 codes.
      how: the values and the layout of its codes.
      result: dtype of the result.
      dtype: bfloat16, float16 or float32, in which values are multiplied, or the float8 of the codes of both operands,
        on chips that multiply it. Codes of x stay int8 if the weight has integer codes in groups that are long enough.
      rows: float32 [M], scales of x, or None.
      stacked: how many such products a `jax.vmap` makes one kernel of.
      interpret: run in Pallas' interpreter, on any device.

    Returns:
      [M, N].
    """
    x, w, rows = alike((x, w, rows))
    m = x.shape[0]
    integers = x.dtype == jnp.int8 and _multiplies_integers(w, how)
    multiplied = jnp.dtype(jnp.int8 if integers else dtype)
    b = blocks(m, how, codes=multiplied.itemsize == 1)
    given = {"rows": rows, **{name: getattr(w, name) for name in Weight._fields[1:]}}
    if b.parts > 1:  # sums are scaled when they are complete
        given |= {"columns": None, "rows": None}
    operands = {name: value for name, value in given.items() if value is not None}
    wide = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    kernel = _Kernel(how, b, m, multiplied, tuple(operands), wide if multiplied == jnp.float32 else None)
    operations = 2 * stacked * m * how.length * how.columns
    scheme = jnp.int8 if x.dtype == jnp.int8 and how.qtype.kind == "int" else dtype
    shape = (m, how.columns) if b.parts == 1 else (b.parts, m, how.columns)
    out = pl.pallas_call(
        kernel,
        out_shape=shaped(shape, result if b.parts == 1 else jnp.float32, x),
        grid=(-(-how.columns // b.columns), -(-m // b.rows), b.parts),
        interpret=interpret,
        compiler_params=params(b.warps, b.stages),
        name="quantized_product",
        **told(operations, scheme),
    )(x, w.codes, *operands.values())
    if b.parts == 1:
        return out
    out = jnp.sum(out, axis=0)
    out = out if w.columns is None else out * w.columns[None, :]
    return (out if rows is None else out * rows[:, None]).astype(result)


def _multiplies_integers(w: Weight, how: Decoding) -> bool:
    """Whether the weight's codes fit 8 bits, so that they are multiplied by int8 codes as integers."""
    if how.qtype.kind != "int" or w.offset is not None or (how.groups > 1 and how.group % _SHALLOWEST_INT8):
        return False
    return how.qtype.bits <= 4 or (how.qtype.signed and w.zero_point is None)
