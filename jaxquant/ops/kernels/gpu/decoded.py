"""Products whose codes are decoded in the registers of a GPU: the choice of weights, and their form for the kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.qtensor import QTensor, flat, scale_values
from jaxquant.ops.forms import Axes
from jaxquant.ops.kernels.decoded import Decoded
from jaxquant.ops.problem import Kernel, Product

if TYPE_CHECKING:
    from jaxquant.ops.kernels.gpu.product import Weight
    from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["Place", "TritonDecoded", "has_blocks", "in_int8", "run"]

T = TypeVar("T")

_SHORTEST_GROUP = 16  # along k, of one step of a tensor core
_LARGEST = 2**31  # elements, whose places are int32


@dataclasses.dataclass(frozen=True)
class TritonDecoded(Kernel[Product]):
    """A stored weight of 4 bits or less, or with groups, by `jaxquant.ops.kernels.gpu.product`.

    Attributes:
      dtype: of the values.
    """

    platforms = ("cuda",)

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the values, and the decoder."""
        return f"{jnp.dtype(self.dtype).name}, decoded by Triton"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: where XLA would write the weight's values to memory, and the kernel has blocks.

        XLA fuses one conversion into a product. So weights whose codes are numbers, with one scale per row and no zero
        point, are left to XLA, except int4 in a stack of layers, which XLA copies as a whole. The kernel does not
        support groups whose size is not a multiple of 16; contracted axes that are stored between others; float zero
        points of another dtype than the values; float64; symbolic sizes; shardings that are part of types.
        """
        portable = Decoded.takes(problem) if has_blocks(problem) else None
        if not isinstance(portable, Decoded) or portable.dtype == jnp.float64 or problem.w.size >= _LARGEST:
            return None
        w, place = problem.weight, Place.of(problem.weight, problem.w_axes)
        if place is None:
            return None
        plain = place.groups == 1 and w.symmetric and w.type.kind != "table"
        if plain and not (w.in_int4 and w.layer is not None):
            return None
        fits = place.groups == 1 or (place.length // place.groups) % _SHORTEST_GROUP == 0
        zero = None if w.zero_point is None else w.zero_point.dtype
        # Differences from a float are rounded to its dtype, as its format has it, and here to that of the values.
        whole = zero is None or jnp.issubdtype(zero, jnp.integer) or zero == portable.dtype
        return cls(portable.dtype) if fits and whole else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, self.dtype)


@dataclasses.dataclass(frozen=True)
class Place:
    """The order of a stored weight's axes, in the kernel's terms.

    Attributes:
      k_last: whether the contracted axes are stored last.
      batch, length, columns, groups: B, K, N and G.
    """

    k_last: bool
    batch: int
    length: int
    columns: int
    groups: int

    @classmethod
    def of(cls, w: QTensor, axes: Axes) -> Place | None:
        """The place of a weight; None if its axes, or the blocks of its scales, are in an order that does not fit."""
        stored = w.stored_order
        k_last = axes.batch + axes.rows + axes.contract == stored
        if not k_last and axes.batch + axes.contract + axes.rows != stored:
            return None
        shape, scale = w.shape, w.scale.shape
        for part in (axes.batch, axes.rows):
            if any(scale[i] != shape[i] for i in part) and any(scale[i] != 1 for i in part):
                return None
        outer = True  # along k: whole axes, then one in blocks, then axes with one scale
        for i in axes.contract:
            if scale[i] != 1 and not outer:
                return None
            outer = outer and scale[i] == shape[i]
        b, k, n = (math.prod(shape[i] for i in part) for part in (axes.batch, axes.contract, axes.rows))
        return cls(k_last, b, k, n, math.prod(scale[i] for i in axes.contract))

    def ordered(self, k: T, n: T) -> tuple[T, T]:
        """Items for k and for n, in the order of the axes."""
        return (n, k) if self.k_last else (k, n)


def run(problem: Product, dtype: DTypeLike, *, interpret: bool = False) -> jax.Array:
    """The product of a problem that the kernel takes.

    Args:
      problem: see `TritonDecoded.takes`.
      dtype: of the values, or the float8 of the codes of both operands.
      interpret: see `jaxquant.ops.kernels.gpu.product.product`.
    """
    from jaxquant.ops.kernels.gpu.product import batched  # Pallas takes long to load

    problem = problem.in_stored_order()
    x, axes, rows = problem.x, problem.x_axes, None
    one_byte = jnp.dtype(dtype).itemsize == 1
    if isinstance(x, QTensor) and (in_int8(x) or one_byte) and all(x.scale.shape[i] == 1 for i in axes.contract):
        codes = x.logical_codes()
        patterns = jnp.issubdtype(codes.dtype, jnp.floating)
        values = axes.flatten(lax.bitcast_convert_type(codes, jnp.uint8) if patterns else codes)
        rows = jnp.broadcast_to(axes.flatten(scale_values(x.scale).astype(jnp.float32))[:, :, 0], values.shape[:2])
    else:
        values = axes.flatten(x.dequantize(dtype) if isinstance(x, QTensor) else x.astype(dtype))
    weight, how = _stored(problem.weight, problem.w_axes)
    result = problem.result if jnp.dtype(problem.result).itemsize < 4 else jnp.float32
    return problem.restored(batched(values, weight, how, result, dtype, rows=rows, interpret=interpret))


def has_blocks(problem: Product) -> bool:
    """Whether a problem is a product of known sizes, on one device or on a mesh whose axes XLA partitions."""
    if not isinstance(problem, Product) or not all(isinstance(n, int) for n in (*problem.x.shape, *problem.w.shape)):
        return False
    arrays = (v for v in jax.tree.leaves((problem.x, problem.w)) if isinstance(v, jax.Array))
    shardings = (getattr(jax.typeof(v), "sharding", None) for v in arrays)
    return all(axis is None for sharding in shardings for axis in getattr(sharding, "spec", ()))


def in_int8(x: QTensor) -> bool:
    """Whether the values of an activation are int8 times a scale."""
    return x.symmetric and x.type.kind == "int" and x.type.bits == 8 and x.type.code_dtype == jnp.int8


def _stored(w: QTensor, axes: Axes) -> tuple[Weight, Decoding]:
    """The stored arrays of a weight, [B, K, N] or [B, N, K], and their decoding."""
    from jaxquant.ops.kernels.gpu.product import Weight
    from jaxquant.ops.kernels.gpu.tiling import Decoding

    place = Place.of(w, axes)
    assert place is not None
    b, last = place.batch, place.ordered(place.length, place.columns)[1]
    stored = w.stored if w.seal is None else lax.bitcast_convert_type(w.stored, jnp.uint8)  # fp8, as for a TPU
    codes = stored.reshape(b, *place.ordered(place.length, place.columns))
    how = "bytes"
    if w.in_int4:
        how = "int4" if last % 2 else "nibbles"
    if how == "nibbles":
        codes = lax.bitcast_convert_type(codes.reshape(*codes.shape[:2], -1, 2), jnp.uint8)

    def flattened(value: jax.Array, last: int | None = None) -> jax.Array:
        """[B, G, N or 1], or [B, N or 1, G]; of bytes that hold several the last axis has another size."""
        lead = math.prod(w.scale.shape[i] for i in axes.batch)
        n = math.prod(w.scale.shape[i] for i in axes.rows)
        shape = [*place.ordered(place.groups, n)]
        if last is not None:
            shape[1] = last
        return jnp.broadcast_to(value.reshape(lead, *shape), (b, *shape))

    def unit(value: jax.Array) -> jax.Array:
        """Scales that are the same for all k: [B, N or 1]."""
        n = math.prod(value.shape[i] for i in axes.rows)
        return jnp.broadcast_to(value.astype(jnp.float32).reshape(-1, n), (b, n))

    scale, columns, scales = w.scale, None, "float"
    if place.groups == 1 and w.offset is None:
        scale, columns = None, unit(scale_values(scale))
    elif isinstance(scale, QTensor) and _is_two_level(scale, axes, place):
        columns = unit(scale_values(scale.scale))
        scales = "nibbles" if scale.type.kind == "int" else "e4m3"
        scale = flattened(scale.stored, scale.stored.shape[-1] if scales == "nibbles" else None)
    elif not isinstance(scale, QTensor) and scale.dtype == jnp.float8_e8m0fnu:
        scale, scales = flattened(lax.bitcast_convert_type(scale, jnp.uint8)), "e8m0"
    else:
        scale = flattened(scale_values(scale) if isinstance(scale, QTensor) else scale)
    zero_point, offset = (None if v is None else flattened(flat(v)) for v in (w.zero_point, w.offset))
    decoding = Decoding(w.type, how, place.k_last, place.length, place.columns, place.groups, scales)
    table = jnp.asarray(w.type.table, jnp.float32) if w.type.kind == "table" else None
    table = None if table is None else jnp.broadcast_to(table, (b, table.size))
    return Weight(codes, scale, zero_point, offset, columns, table), decoding


def _is_two_level(scale: QTensor, axes: Axes, place: Place) -> bool:
    """Whether scales are codes that the kernel decodes, times factors that are the same for all k."""
    if isinstance(scale.scale, QTensor) or not scale.symmetric or scale.minor or scale.split is not None:
        return False
    if scale.permutation is not None or any(scale.scale.shape[i] != 1 for i in axes.contract):
        return False
    n = [scale.scale.shape[i] for i in axes.rows]
    if n != [scale.shape[i] for i in axes.rows] and any(size != 1 for size in n):
        return False
    if scale.qtype == "float8_e4m3fn":
        return True
    one_axis = len(axes.contract if place.k_last else axes.rows) == 1  # along which two are in a byte
    return scale.qtype == "uint4" and scale.length is not None and one_axis
