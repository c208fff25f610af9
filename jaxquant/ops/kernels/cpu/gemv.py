"""GEMV: products of one row, as loops over the weight's codes that XLA fuses: for scales per group.

    y[n] = sum_l sum_c  s[n, g(c, l)] q[n, c L + l] x[c L + l]          L lanes, g the group of an element

The inner sum is written out as elementwise arithmetic on arrays [rows, L], so that one fused loop reads codes, converts
them to float32 in registers, and adds L partial sums for each row of the weight; a dot with ones adds the partial sums.
The float weight is never written to memory, and all arithmetic is float32.

XLA:CPU does not vectorize loops over fewer lanes, so the scale of a group shorter than the lanes is selected by lane.

Integer zero points are subtracted from codes, exactly. Float zero points and offsets are constant in a group, so
``sum_g (o - s z) sum_{k in g} x`` is a separate small product. A second row of the activation would take a second loop,
and a block in float32 is about as fast as two loops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.codec import chosen
from jaxquant.core.qtypes import QType
from jaxquant.core.types import Index
from jaxquant.ops.kernels.cpu.blocks import by_blocks, in_branch, slice_of, total
from jaxquant.ops.kernels.cpu.dots import row_dot
from jaxquant.ops.kernels.precision import is_highest
from jaxquant.ops.problem import Kernel, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["LOOP", "Gemv"]

LOOP = "jaxquant_gemv"
"""The name of these loops in compiled programs."""

_PRODUCTS = 96  # most in one loop: from 128 on LLVM compares too many addresses, and does not vectorize
_SHORTEST = 16  # fewest terms of one of several loops: in shorter ones XLA slices codes as it adds, which is slow
_EXACT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Gemv(Kernel[Product]):
    """One row times integers, fp8 or other 4-bit codes in groups, in a loop that decodes and multiplies."""

    platforms = ("cpu",)

    title = "float32 GEMV"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: a weight with codes (stored with K last) and groups that fit these loops.

        Table values that are not multiples of one unit are rounded to 16 bits, an error of 1e-5 of their norm for nf4.
        So such weights are refused at the highest precision.
        """
        if problem.trained or problem.wide:
            return None
        w = problem.forms[1]
        if not _one_row(problem) or not isinstance(w, Matrix | Packed) or w.rows_last or None in problem.forms:
            return None
        numbers = _numbers(w.qtype)
        fits = (
            numbers is not None and (numbers.exact or not is_highest(problem.precision)) and _chunks_of(w) is not None
        )
        return cls() if fits else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.canonical()
        if isinstance(x, Packed):
            x = x.unpacked()
        return problem.restored(gemv(x.values(jnp.float32) if isinstance(x, Matrix) else x.astype(jnp.float32), w))


def _one_row(problem: Product) -> bool:
    x = problem.forms[0]
    return x is not None and x.shape[1] == 1


def gemv(x: jax.Array, w: Matrix | Packed) -> jax.Array:
    """[B, 1, K] x [B, N, K] -> [B, 1, N] in float32."""
    parts = [x[:, :, i :: w.planes] for i in range(w.planes)]
    # Groups come first, as scales are stored and as the loop reads them.
    levels = [jnp.swapaxes(v, 1, 2) for v in (w.scale, w.multiplier) if v is not None]

    def multiply(block: Matrix | Packed, b: Index, r: Index) -> jax.Array:
        nb, nr, _ = block.shape
        xs = [slice_of(part, b, nb, 0) for part in parts]
        cuts = [slice_of(slice_of(level, b, nb, 0), r, nr, 2) for level in levels]
        with jax.named_scope(LOOP):
            return _scaled(block, cuts, xs)

    out = by_blocks(x, w, multiply)
    shift = _shift(w)
    if shift is None:
        return out
    sums = jnp.sum(x.reshape(x.shape[0], 1, w.groups, -1), axis=3)
    shift = jnp.broadcast_to(shift, (x.shape[0], *shift.shape[1:]))
    return out + row_dot(jnp.pad(sums, ((0, 0), (0, 1), (0, 0))), shift)[:, :1]


class _Chunks(NamedTuple):
    """The split of a plane: ``lanes``, ``chunks`` of terms, and the elements of a ``group``."""

    lanes: int
    terms: int
    chunks: int
    group: int


def _chunks_of(w: Matrix | Packed) -> _Chunks | None:
    """64 lanes for several planes, 128 for one, or the nearest that divides a plane and its groups evenly; or None."""
    groups = w.scale.shape[2] if w.multiplier is None else max(w.scale.shape[2], w.multiplier.shape[2])
    length, best = w.shape[2] // w.planes, 128 if w.planes == 1 else 64
    group, most = length // groups, _PRODUCTS // w.planes
    for count in sorted(range(48, 129), key=lambda n: abs(n - best)):
        if length % count == 0 and (group % count == 0 or (count % group == 0 and count // group <= 8)):
            terms = length // count
            # A chunk has whole groups, or lies in one.
            sizes = [n for n in range(1, min(terms, most) + 1) if terms % n == 0]
            chunk = max((n for n in sizes if n * count % group == 0 or group % (n * count) == 0), default=0)
            if chunk >= min(terms, _SHORTEST):
                return _Chunks(count, chunk, terms // chunk, group)
    return None


class _Numbers(NamedTuple):
    """Numbers for codes: a loop converts them to float32 in an instruction or two, and times a unit they are values.

    Attributes:
      of: function from codes to numbers, or None if codes are the numbers.
      unit: factor from numbers to values.
      exact: whether number times unit equals the value exactly.
    """

    of: Callable[[jax.Array], jax.Array] | None
    unit: float
    exact: bool


@functools.cache
def _numbers(qtype: QType) -> _Numbers | None:
    """Integers unchanged, fp8 as float16, and 4-bit grids as whole numbers; None for other types."""
    if qtype.kind == "int":
        return _Numbers(None, 1.0, True)
    if qtype.kind == "float" and qtype.bits == 8:
        return _Numbers(functools.partial(_halves, qtype), 2.0 ** (15 - 1 + qtype.min_exponent), True)
    if qtype.bits > 4:
        return None
    codes = np.arange(1 << qtype.bits, dtype=np.uint8)
    grid = np.asarray(qtype.table if qtype.element is None else codes.view(qtype.element), np.float64)
    reach = np.abs(grid).max()

    def nearest(counts: np.ndarray) -> tuple[np.ndarray, float, float]:
        """For each number of steps up to the largest magnitude: whole numbers, the unit, and the error; the best."""
        whole = np.rint(grid * counts[:, None] / reach)
        errors = np.abs(whole * reach / counts[:, None] - grid).max(axis=1)
        found = int(errors.argmin())
        return whole[found], reach / counts[found], errors[found] / reach

    whole, unit, error = nearest(np.arange(1, 128))
    dtype = np.int8 if error <= _EXACT else np.int16
    if dtype is np.int16:
        whole, unit, error = nearest(np.arange(1, 1 << 15))
    return _Numbers(functools.partial(chosen, table=whole.astype(dtype)), float(unit), bool(error <= _EXACT))


def _halves(qtype: QType, codes: jax.Array) -> jax.Array:
    """fp8 patterns as float16, by moving exponent and mantissa: values are 2 ** (15 - fp8's bias) times too small."""
    bits = codes.astype(jnp.uint16)
    magnitude = bits & 0x7F
    half = (magnitude << (10 - qtype.mantissa_bits)) | ((bits & 0x80) << 8)
    if qtype.mantissa_bits == 3:  # no infinities: all ones are NaN
        half = jnp.where(magnitude == 0x7F, jnp.uint16(0x7E00), half)
    return lax.bitcast_convert_type(half, jnp.float16)


def _scaled(block: Matrix | Packed, levels: list[jax.Array], parts: list[jax.Array]) -> jax.Array:
    """``sum_k s q x`` for a block, [nb, 1, nr]; ``levels`` are the factors of the scale, [nb or 1, G, nr or 1]."""
    numbers = _numbers(block.qtype)
    cut = _chunks_of(block)
    assert numbers is not None
    assert cut is not None
    count, group, size = cut.lanes, cut.group, cut.lanes * cut.terms
    codes, scale = _apart(block, levels, numbers)
    lane = lax.broadcasted_iota(jnp.int32, (1, 1, count), 2)

    def scale_of(scale: jax.Array, first: int) -> jax.Array:
        """[nb, nr, 1 or lanes]: the scale of each lane of the term that begins at element ``first``."""
        at = first // group
        found = scale[:, at, :, None]
        for i in range(1, count // group):
            found = jnp.where(lane >= i * group, scale[:, at + i, :, None], found)
        return found

    def add(codes: list[jax.Array], parts: list[jax.Array], scale: jax.Array) -> jax.Array:
        terms = []
        for first in range(0, codes[0].shape[2], count):
            at = slice(first, first + count)
            products = (q[:, :, at].astype(jnp.float32) * x[:, :, at] for q, x in zip(codes, parts, strict=True))
            terms.append(total(products) * scale_of(scale, first))
        return total(terms)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size, axis=2)
        at = lax.dynamic_slice_in_dim(scale, i * size // group, max(size // group, 1), axis=1)
        return out + add([part(q) for q in codes], [part(x) for x in parts], at)

    if cut.chunks == 1:
        sums = add(codes, parts, scale)
    else:
        # Zeros that vary over devices as both operands do.
        zeros = jnp.where(parts[0][:, :, :1] > 0, 0.0, 0.0) + 0 * codes[0][:, :, :count].astype(jnp.float32)
        sums = lax.fori_loop(0, cut.chunks, step, zeros)
    ones = jnp.ones((1, 2, count), jnp.float32)  # two rows: one row has no fast path
    out = row_dot(sums.reshape(1, -1, count), ones)
    return out[0, :, 0].reshape(sums.shape[0], 1, sums.shape[1])


def _apart(block: Matrix | Packed, levels: list[jax.Array], numbers: _Numbers) -> tuple[list[jax.Array], jax.Array]:
    """The numbers of the block's codes in planes, less integer zero points, and its scales, [nb or 1, G, nr or 1].

    They are computed in a branch: if XLA fused them into the loop, selects and conversions would run element by
    element.
    """
    zero_point = block.zero_point if _is_whole(block.zero_point) else None

    def number(codes: jax.Array) -> jax.Array:
        if zero_point is None:
            return codes if numbers.of is None else numbers.of(codes)
        groups = codes.astype(jnp.int16).reshape(*codes.shape[:2], zero_point.shape[2], -1)
        return (groups - zero_point.astype(jnp.int16)[..., None]).reshape(codes.shape)

    def unpacked() -> tuple[list[jax.Array], jax.Array]:
        scale = functools.reduce(jnp.multiply, (level.astype(jnp.float32) for level in levels))
        return [number(codes) for codes in block.code_planes()], scale * numbers.unit

    if isinstance(block, Matrix) and numbers.of is None and zero_point is None:
        return [block.codes], levels[0]
    return in_branch(block.stored, unpacked)


def _is_whole(zero_point: jax.Array | None) -> bool:
    """Whether zero points are integers, which are subtracted from codes exactly."""
    return zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.integer)


def _shift(w: Matrix | Packed) -> jax.Array | None:
    """The term that float zero points and offsets add to each element of a group, [B or 1, N or 1, G], or None."""
    zero_point = None if _is_whole(w.zero_point) else w.zero_point
    shift = None if zero_point is None else -w.scales * zero_point.astype(jnp.float32)
    if w.offset is None:
        return shift
    return w.offset if shift is None else shift + w.offset
