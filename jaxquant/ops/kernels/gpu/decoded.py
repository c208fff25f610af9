"""Products whose codes are decoded in the registers of a GPU: the choice of weights, and their form for the kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.qtensor import Operand, QTensor, Scale, flat, scale_values
from jaxquant.core.stack import Layer
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.decoded import Decoded
from jaxquant.ops.kernels.dequantized import value_dtype
from jaxquant.ops.problem import Kernel, Problem, Product

if TYPE_CHECKING:
    from jaxquant.ops.kernels.gpu.product import Weight
    from jaxquant.ops.kernels.gpu.tiling import Decoding, Stored

__all__ = [
    "Place",
    "TritonDecoded",
    "TritonLayer",
    "activation",
    "decodes",
    "has_blocks",
    "has_places",
    "in_int8",
    "result_dtype",
    "run",
    "stored",
    "weight_arrays",
]

T = TypeVar("T")

_SHORTEST_GROUP = 16  # along k, of one step of a tensor core
_LARGEST = 2**31  # elements, whose places are int32

_FEW = 256
"""The most rows for which copying a byte takes an H100 longer than multiplying it: 0.6 ps, at 3,350 GB/s, and 0.5."""


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
        if not isinstance(portable, Decoded):
            return None
        w, place = problem.weight, Place.of(problem.weight, problem.w_axes)
        plain = place is not None and place.groups == 1 and w.symmetric and w.type.kind != "table"
        return None if plain and not (w.in_int4 and w.layer is not None) else cls._of(problem, place, portable.dtype)

    @classmethod
    def _of(cls, problem: Product, place: Place | None, dtype: DTypeLike) -> Kernel[Product] | None:
        """The kernel for values of a dtype, if it finds every code of the weight and decodes it."""
        return cls(dtype) if problem.w.size < _LARGEST and decodes(problem.weight, place, dtype) else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, self.dtype)


@dataclasses.dataclass(frozen=True)
class TritonLayer(TritonDecoded):
    """Few rows by a layer of a stack whose codes have 8 bits, with one scale per row: XLA copies the layer first."""

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: as for `TritonDecoded`, but float rows, and codes that are stored as they are."""
        w = problem.w
        if isinstance(problem.x, QTensor) or not isinstance(w, QTensor) or w.layer is None or w.is_reshaped:
            return None
        if w.length is not None or w.permutation is not None or not has_blocks(problem) or problem.rows > _FEW:
            return None
        place = Place.of(w, problem.w_axes)
        fits = place is not None and place.groups == 1 and problem.forms[1] is not None
        return cls._of(problem, place, value_dtype(problem)) if fits else None


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
    from jaxquant.ops.kernels.gpu.batched import batched  # Pallas takes long to load

    problem = problem.in_stored_order()
    values, rows = activation(problem.x, problem.x_axes, dtype)
    weight, how, stack = weight_arrays(problem.weight, problem.w_axes)
    given: dict[str, Any] = {"rows": None if rows is None else rows[None], **stack, "interpret": interpret}
    return problem.restored(batched(values[None], weight, how, result_dtype(problem), dtype, **given)[0])


def result_dtype(problem: Problem) -> DTypeLike:
    """The dtype of the kernel's result: that of the problem if it is narrow, or float32."""
    return problem.result if jnp.dtype(problem.result).itemsize < 4 else jnp.float32


def decodes(w: QTensor, place: Place | None, dtype: DTypeLike) -> bool:
    """Whether the kernel decodes a weight's codes to values of a dtype."""
    if place is None or dtype == jnp.float64:
        return False
    fits = place.groups == 1 or (place.length // place.groups) % _SHORTEST_GROUP == 0
    zero = w.zero_point
    # Differences from a float are rounded to its dtype, as its format has it, and here to that of the values.
    return fits and (zero is None or jnp.issubdtype(zero.dtype, jnp.integer) or zero.dtype == dtype)


def activation(x: Operand, axes: Axes, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """The rows of an activation, [B, M, K]: codes, with scales [B, M] in float32, or values in a dtype, and None.

    Codes are int8, or patterns of float8 in uint8 if that is the dtype.
    """
    one_byte = jnp.dtype(dtype).itemsize == 1
    if isinstance(x, QTensor) and (in_int8(x) or one_byte) and all(x.scale.shape[i] == 1 for i in axes.contract):
        codes = x.logical_codes()
        patterns = jnp.issubdtype(codes.dtype, jnp.floating)
        values = axes.flatten(lax.bitcast_convert_type(codes, jnp.uint8) if patterns else codes)
        scales = axes.flatten(scale_values(x.scale).astype(jnp.float32))[:, :, 0]
        return values, jnp.broadcast_to(scales, values.shape[:2])
    return axes.flatten(x.dequantize(dtype) if isinstance(x, QTensor) else x.astype(dtype)), None


def has_blocks(problem: Problem) -> bool:
    """Whether operands have known sizes, and are on one device or on a mesh whose axes XLA partitions."""
    if not all(isinstance(n, int) for n in (*problem.x.shape, *problem.w.shape)):
        return False
    arrays = (v for v in jax.tree.leaves((problem.x, problem.w)) if isinstance(v, jax.Array))
    shardings = (getattr(jax.typeof(v), "sharding", None) for v in arrays)
    return all(axis is None for sharding in shardings for axis in getattr(sharding, "spec", ()))


def in_int8(x: QTensor) -> bool:
    """Whether the values of an activation are int8 times a scale."""
    return x.symmetric and x.type.kind == "int" and x.type.bits == 8 and x.type.code_dtype == jnp.int8


def weight_arrays(w: QTensor, axes: Axes) -> tuple[Weight, Decoding, dict[str, Any]]:
    """The stored arrays of a weight, as the kernel takes them, and how they are stored.

    Also the ``stack`` and ``layer`` that it is in, if it is in one: the stack's arrays, None where a layer's array is
    no slice of one.
    """
    from jaxquant.ops.kernels.gpu.product import Weight
    from jaxquant.ops.kernels.gpu.tiling import Decoding

    place = Place.of(w, axes)
    assert place is not None
    b, whole = place.batch, dict[str, jax.Array]()
    order, (how, in_byte) = place.ordered(place.length, place.columns), stored(w, place)

    def in_bytes(name: str, value: jax.Array) -> jax.Array:
        """Patterns, of codes in fp8 (as TPUs have them), of two codes in a byte, and of powers of two."""
        codes = name == "codes"
        if value.dtype == jnp.float8_e8m0fnu or (codes and w.seal is not None):
            value = lax.bitcast_convert_type(value, jnp.uint8)
        pairs = codes and how == "nibbles"
        return lax.bitcast_convert_type(value.reshape(*value.shape[:-1], -1, 2), jnp.uint8) if pairs else value

    def found(name: str, value: jax.Array | Layer, *shape: int, in_byte: int = 1) -> jax.Array:
        """[1, B, *shape]; of a whole stack, if the array is a slice of one, [layers, B, *shape]."""
        of_stack, each = w.in_stack(value), b * math.prod(shape)
        if of_stack is not value and math.prod(of_stack.shape[1:]) == each and has_places(of_stack, in_byte):
            whole[name] = in_bytes(name, of_stack.reshape(-1, b, *shape))
        own = value.array() if isinstance(value, Layer) else value
        return in_bytes(name, jnp.broadcast_to(own.reshape(1, -1, *shape), (1, b, *shape)))

    def by_group(name: str, value: jax.Array, last: int | None = None) -> jax.Array:
        """[G, N or 1], or [N or 1, G]; of bytes that hold several the last axis has another size."""
        first, size = place.ordered(place.groups, math.prod(value.shape[i] for i in axes.rows))
        return found(name, value, first, size if last is None else last)

    def by_column(value: Scale) -> jax.Array:
        """Scales that are the same for all k: [N or 1]."""
        n = math.prod(value.shape[i] for i in axes.rows)
        if isinstance(value, QTensor) or value.dtype == jnp.float8_e8m0fnu:
            value = scale_values(value)
        return found("columns", value, n)

    codes = found("codes", w.kept, *order, in_byte=in_byte)
    scale, columns, scales = w.scale, None, "float"
    if place.groups == 1 and w.offset is None:
        scale, columns = None, by_column(scale)
    elif isinstance(scale, QTensor) and _is_two_level(scale, axes, place):
        columns = by_column(scale.scale)
        scales = "nibbles" if scale.type.kind == "int" else "e4m3"
        scale = by_group("scale", scale.stored, scale.stored.shape[-1] if scales == "nibbles" else None)
    elif isinstance(scale, QTensor):
        scale = by_group("scale", scale_values(scale))
    else:
        scales = "e8m0" if scale.dtype == jnp.float8_e8m0fnu else "float"
        scale = by_group("scale", scale)
    zero_point = None if w.zero_point is None else by_group("zero_point", w.zero_point)
    offset = None if w.offset is None else by_group("offset", flat(w.offset))
    decoding = Decoding(w.type, how, place.k_last, place.length, place.columns, place.groups, scales)
    table = jnp.asarray(w.type.table, jnp.float32) if w.type.kind == "table" else None
    table = None if table is None else jnp.broadcast_to(table, (1, b, table.size))
    weight, stack = Weight(codes, scale, zero_point, offset, columns, table), {}
    if w.layer is not None:
        stack["stack"] = Weight._make(whole.get(name) for name in Weight._fields)
        stack["layer"] = jnp.reshape(w.layer, 1).astype(jnp.int32)
    return weight, decoding, stack


def stored(w: QTensor, place: Place) -> tuple[Stored, int]:
    """How a weight's codes are read, and how many of them are in a byte then."""
    if not w.in_int4:
        return "bytes", 1
    return ("int4", 1) if place.ordered(place.length, place.columns)[1] % 2 else ("nibbles", 2)


def has_places(array: jax.Array | Layer, in_byte: int) -> bool:
    """Whether Pallas finds every element: it counts in int32 up to 4 GiB, which are more elements if they are bytes."""
    size = math.prod(array.shape) // in_byte
    return size <= _LARGEST or size * array.dtype.itemsize > 2**32


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
