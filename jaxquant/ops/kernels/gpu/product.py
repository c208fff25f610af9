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

Edges are masked: no operand is padded or copied. The weight may be a layer of a stack, which is an operand as a whole:
the kernel reads its index from memory and adds the layer to the places of all it loads. So nothing is sliced before it.
In a ragged product a program reads from a table which rows are its own, and which expert it multiplies them by.

The kernel has not been timed; see `jaxquant.ops.kernels.gpu.tiling`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.tiling import Blocks, Decoding, blocks
from jaxquant.ops.kernels.gpu.triton import alike, load, params, shaped, store, told
from jaxquant.ops.kernels.segments import Segments, most_tiles

__all__ = ["Weight", "product"]

_SHALLOWEST_INT8 = 32  # along k, of one step of a tensor core


class _Operand(NamedTuple):
    """An array that a kernel reads: as it is, or one layer of it."""

    ref: jax.Ref
    layer: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer."""
        return self.ref.shape if self.layer is None else self.ref.shape[1:]

    def load(self, index: tuple[jax.Array, ...], mask: jax.Array | None) -> jax.Array:
        """As `jaxquant.ops.kernels.gpu.triton.load`, from the layer."""
        return load(self.ref, index if self.layer is None else (self.layer, *index), mask)


_Operands = Mapping[str, _Operand]
"""The operands of a kernel after x, by name."""


class _Rows(NamedTuple):
    """The rows of a program: from the first one on, and before the end; None if all are."""

    first: jax.Array
    end: jax.Array | int | None

    def hold(self, m: jax.Array) -> jax.Array | None:
        """A mask of the rows that are among them; None if all are."""
        return None if self.end is None else m < self.end


class Weight(NamedTuple):
    """A stored weight. The arrays that `Decoding.stacked` names have one axis more in front, for the layers of a stack.

    In a ragged product all have one axis more, for experts, and for the experts of all layers where it is a stack's.

    Attributes:
      codes: [K, N], or [N, K] if ``k_last``; uint8 of two codes along the last axis, or int8, uint8, or int4.
      scale: [G, N or 1], or [N or 1, G]; float, or uint8 patterns of float8_e8m0fnu or float8_e4m3fn, or two in a byte
        as unsigned integers; None if scales are constant along k.
      zero_point, offset: of the same shape, integer and float, or None.
      columns: float [N or 1], scales that are constant along k, or None.
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
      names: of the operands after x.
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

    def __call__(self, x: jax.Ref, *rest: jax.Ref) -> None:
        *given, out = rest
        column, row, part = (pl.program_id(axis) for axis in range(3))
        w, rows = self._place(dict(zip(self.names, given, strict=True)), row)
        apart = self.steps * self.b.depth  # slices, along k
        sides = [
            self._flat(column * self.b.columns + plane, self.b.columns // self._sides, self._sides)
            for plane in range(self._sides)
        ]

        def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k = part * (self.b.slices * apart) + i * self.b.depth
            at = [(n, k + apart * n_slice) for n, n_slice in sides]
            slices = k + apart * lax.iota(jnp.int32, self.b.slices)
            products = self._products(w, x, self._tiles(w["codes"], column, slices), rows, slices, at)
            if self.scaled_sums and "scale" in w:
                scales = (self._scale(w, n, k, self.b.depth) for n, k in at)
                products = [p.astype(jnp.float32) * s for p, s in zip(products, scales, strict=True)]
            return tuple(total + p for total, p in zip(sums, products, strict=True))

        whole = self.integers and "scale" not in w
        zero = jnp.zeros((sides[0][0].shape[0], self.b.slices * self.b.rows), jnp.int32 if whole else jnp.float32)
        sums = lax.fori_loop(*self._span(rows), step, (zero,) * len(sides))
        for plane, total in enumerate(sums):
            n = column * self.b.columns + plane
            n = n + self._sides * lax.iota(jnp.int32, self.b.columns // self._sides)
            self._write(out, w, total.astype(jnp.float32), rows, n, part)

    def _span(self, rows: _Rows) -> tuple[Any, Any]:
        """The first step along k and the end of the steps. A tile without rows has none."""
        if "tiles" not in self.names or rows.end is None:
            return 0, self.steps
        return jnp.int32(0), jnp.asarray(rows.first < rows.end).astype(jnp.int32) * self.steps

    def _place(self, refs: dict[str, jax.Ref], row: jax.Array) -> tuple[_Operands, _Rows]:
        """The operands, of the layer or expert of a block of rows, and these rows."""
        tiles, layer, expert = refs.pop("tiles", None), None, None
        if tiles is not None:
            expert, layer, first, end = (tiles[row, i] for i in range(4))
            rows = _Rows(first, end)
        else:
            layer = refs.pop("layer")[...] if self.w.stacked else None
            rows = _Rows(row * self.b.rows, None if self.rows % self.b.rows == 0 else self.rows)
        of = {name: layer if name in self.w.stacked else expert for name in Weight._fields}
        return {name: _Operand(ref, of.get(name)) for name, ref in refs.items()}, rows

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
        w: _Operands,
        x: jax.Ref,
        tiles: list[jax.Array],
        rows: _Rows,
        k: jax.Array,
        sides: list[tuple[jax.Array, jax.Array]],
    ) -> list[jax.Array]:
        """The sums of a step, one for each side."""
        if self.w.k_last and self.planes == 2:
            planes = [self._rows_of(x, rows, k, plane) for plane in range(2)]
            even, odd = (self._multiplied(w, t, p, *sides[0]) for t, p in zip(tiles, planes, strict=True))
            return [even + odd]
        values = self._rows_of(x, rows, k, None)
        return [self._multiplied(w, tile, values, *side) for tile, side in zip(tiles, sides, strict=True)]

    def _write(self, out: jax.Ref, w: _Operands, total: jax.Array, rows: _Rows, n: jax.Array, part: jax.Array) -> None:
        """Writes the sums of matching slices to the result."""
        m, slices = rows.first + lax.iota(jnp.int32, self.b.rows), self.b.slices
        if slices > 1:
            total = total.reshape(slices, -1, slices, self.b.rows)
            left, right = (lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 2))
            total = jnp.sum(jnp.sum(jnp.where(left == right, total, 0.0), axis=2), axis=0)
        store_at = m[:, None], n[None, :]
        mask = _both(rows.hold(store_at[0]), self._in_n(store_at[1]))
        if "columns" in w:
            one = w["columns"].shape[0] == 1
            scale = w["columns"].load((n * 0 if one else n,), self._in_n(n))
            total = total * scale.astype(jnp.float32)[:, None]
        if "rows" in w:
            total = total * w["rows"].load((m,), rows.hold(m))[None, :]
        at = (part, *store_at) if self.b.parts > 1 else store_at
        store(out, at, jnp.transpose(total).astype(out.dtype), mask)

    # -- masks: None where a size is whole blocks ----------------------------------------------------------------------

    def _in_n(self, n: jax.Array) -> jax.Array | None:
        return None if self.w.columns % self.b.columns == 0 else n < self.w.columns

    def _in_k(self, k: jax.Array, size: int) -> jax.Array | None:
        """The mask along k of an axis of ``size`` elements."""
        whole = self.w.length == self.steps * self.b.slices * self.b.parts * self.b.depth
        return None if whole else k < size

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _rows_of(self, x: jax.Ref, rows: _Rows, k: jax.Array, plane: int | None) -> jax.Array:
        """A tile of the activation: all elements of a step, or the even or odd ones."""
        stride = 1 if plane is None else 2
        m = (rows.first + lax.iota(jnp.int32, self.b.rows))[None, :, None]
        at = (plane or 0) + stride * lax.iota(jnp.int32, self.b.depth // stride)[None, None, :] + k[:, None, None]
        tile = load(x, (m, at), _both(rows.hold(m), self._in_k(at, self.w.length)))
        tile = lax.bitcast_convert_type(tile, self.dtype) if self.patterns else tile.astype(self.dtype)
        return jnp.transpose(tile.reshape(-1, self.b.depth // stride))

    def _tiles(self, codes: _Operand, column: jax.Array, k: jax.Array) -> list[jax.Array]:
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
            tile = codes.load((n, at), mask).reshape(-1, depth)
        else:
            tile = jnp.transpose(codes.load((at, n), mask).reshape(depth, -1))
        if self.w.stored == "int4":
            return [lax.bitcast_convert_type(tile.astype(jnp.int16), jnp.uint16) & 15]
        if self.planes == 1:
            return [tile]
        tile = tile.astype(jnp.uint16)
        return [tile & 15, tile >> 4]

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _multiplied(self, w: _Operands, tile: jax.Array, rows: jax.Array, n: jax.Array, k: jax.Array) -> jax.Array:
        """The product of one plane of codes, of columns n from k on, and the rows of x."""
        values, depth = self._values(w, tile), tile.shape[1]
        if "zero_point" in w:
            z = self._entry(w["zero_point"], n, k, depth)
            values = values - z.astype(jnp.int32 if self.integers else jnp.float32).astype(values.dtype)
        if "scale" in w and not self.scaled_sums:
            values = values.astype(jnp.float32) * self._scale(w, n, k, depth)
            if "offset" in w:
                values = values + self._entry(w["offset"], n, k, depth).astype(jnp.float32)
        result, numbers = jnp.int32 if self.integers else jnp.float32, (((1,), (0,)), ((), ()))
        return lax.dot_general(values.astype(self.dtype), rows, numbers, self.precision, result)

    def _values(self, w: _Operands, tile: jax.Array) -> jax.Array:
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
            return w["table"].load((index.astype(jnp.int32),), None).astype(self.dtype)
        if not small:
            return tile.astype(self.dtype)
        return _small_integers(tile, 8 if qtype.signed else 0, self.dtype)

    def _entry(self, entries: _Operand, n: jax.Array, k: jax.Array, depth: int) -> jax.Array:
        """The entries of columns n from k on: [columns, 1 or depth]; for a depth of 0 [columns, groups]."""
        n, group = n[:, None], self._groups(k)
        one = entries.shape[0 if self.w.k_last else 1] == 1
        index = n * 0 if one else n, group
        mask = _both(self._in_n(n), self._in_k(group, self.w.groups))
        return self._spread(entries.load(index if self.w.k_last else index[::-1], mask), depth)

    def _scale(self, w: _Operands, n: jax.Array, k: jax.Array, depth: int) -> jax.Array:
        """Scales in float32, shaped as by `_entry`."""
        scale = w["scale"]
        if self.w.scales == "nibbles":
            at, group = n[:, None], self._groups(k)
            index = (at, group // 2) if self.w.k_last else (group, at // 2)
            mask = _both(self._in_n(at), self._in_k(group, self.w.groups))
            found = (scale.load(index, mask).astype(jnp.int32) >> (4 * ((group if self.w.k_last else at) & 1))) & 15
            return self._spread(found.astype(jnp.float32), depth)
        found = self._entry(scale, n, k, 0)
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


def product(
    x: jax.Array,
    w: Weight,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    *,
    rows: jax.Array | None = None,
    layer: jax.Array | None = None,
    segments: Segments | None = None,
    repeated: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """The product of an activation and the values of a weight, or of the experts of each segment of rows.

    Args:
      x: [M, K]: bfloat16, float16 or float32, or codes in int8 or patterns of float8 in uint8.
      w: the weight, with groups of a multiple of 16 codes.
      how: the values and the layout of its codes.
      result: dtype of the result.
      dtype: bfloat16, float16 or float32, in which values are multiplied, or the float8 of the codes of both operands,
        on chips that multiply it. Codes of x stay int8 if the weight has integer codes in groups that are long enough.
      rows: float32 [M], scales of x, or None.
      layer: an int32, which layer of the arrays of a stack; None without a stack.
      segments: for a ragged product; all arrays of the weight have an axis of experts in front then, also of a stack.
      repeated: how many such products a `jax.vmap` makes one kernel of.
      interpret: run in Pallas' interpreter, on any device.

    Returns:
      [M, N]; rows without an expert are not written.
    """
    x, w, rows, layer, segments = alike((x, w, rows, layer, segments))
    m, count = x.shape[0], 1 if segments is None else segments.start.shape[0]
    integers = x.dtype == jnp.int8 and _multiplies_integers(w, how)
    multiplied = jnp.dtype(jnp.int8 if integers else dtype)
    b = blocks(m, how, segments=count, codes=multiplied.itemsize == 1)
    given = {**w._asdict(), "rows": rows, "layer": layer if how.stacked else None}
    # Where k is in parts, the sums of one weight are scaled once, after the parts are added. In a ragged product a
    # column has other scales in other rows, those of their expert: the kernel, which knows it, scales each part before.
    scaled_last = b.parts > 1 and segments is None
    if scaled_last:
        given |= {"columns": None, "rows": None}
    most = -(-m // b.rows) if segments is None else most_tiles(m, count, b.rows)
    given["tiles"] = None if segments is None else segments.tiles(m, b.rows)
    operands = {name: value for name, value in given.items() if value is not None}
    wide = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    kernel = _Kernel(how, b, m, multiplied, tuple(operands), wide if multiplied == jnp.float32 else None)
    operations = 2 * repeated * m * how.length * how.columns
    scheme = jnp.int8 if x.dtype == jnp.int8 and how.qtype.kind == "int" else dtype
    shape = (m, how.columns) if b.parts == 1 else (b.parts, m, how.columns)
    out = pl.pallas_call(
        kernel,
        out_shape=shaped(shape, result if b.parts == 1 else jnp.float32, x),
        grid=(-(-how.columns // b.columns), most, b.parts),
        interpret=interpret,
        compiler_params=params(b.warps, b.stages),
        name="quantized_product",
        **told(operations, scheme),
    )(x, *operands.values())
    if b.parts == 1:
        return out
    out = jnp.sum(out, axis=0)
    if not scaled_last:
        return out.astype(result)
    if w.columns is not None:
        columns = w.columns[layer] if "columns" in how.stacked else w.columns
        out = out * columns.astype(jnp.float32)[None, :]
    return (out if rows is None else out * rows[:, None]).astype(result)


def _multiplies_integers(w: Weight, how: Decoding) -> bool:
    """Whether the weight's codes fit 8 bits, so that they are multiplied by int8 codes as integers."""
    if how.qtype.kind != "int" or w.offset is not None or (how.groups > 1 and how.group % _SHALLOWEST_INT8):
        return False
    return how.qtype.bits <= 4 or (how.qtype.signed and w.zero_point is None)
