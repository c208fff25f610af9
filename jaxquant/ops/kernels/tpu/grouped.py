"""Chooses the products that `grouped_product` computes: weights of a scale per group on a TPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core.arithmetic import finfo
from jaxquant.core.by_platform import Target
from jaxquant.core.codec import values_of
from jaxquant.core.qtensor import QTensor, Scale, flat, scale_values
from jaxquant.core.qtypes import FACTOR
from jaxquant.core.sizes import number
from jaxquant.ops.kernels.decoded import Decoded
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.kernels.tpu.activation import FEW
from jaxquant.ops.kernels.tpu.chips import GATHER_BYTES, MULTIPLY_FLOATS_ONLY, TWO_CORES, V6E
from jaxquant.ops.kernels.tpu.decode import BLOCK, Decoder, decoder
from jaxquant.ops.kernels.tpu.decoded import BatchedDecoded, is_fp8_of_columns
from jaxquant.ops.kernels.tpu.dots import is_read_in_product
from jaxquant.ops.kernels.tpu.grouped_sums import Sums
from jaxquant.ops.kernels.tpu.grouped_values import Values, ValuesInParts
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.layout import in_tiles
from jaxquant.ops.kernels.tpu.product import body_for, grouped_product
from jaxquant.ops.kernels.tpu.undivided import run_undivided
from jaxquant.ops.problem import Kernel, Product

__all__ = [
    "ByteSums",
    "ByteValues",
    "ColumnSums",
    "ColumnValues",
    "FloatSums",
    "FloatValues",
    "GathersBytes",
    "Grouped",
    "GroupedSums",
    "GroupedValues",
    "ManyRows",
    "weight_arrays",
    "weight_groups",
]


_LARGE = 32 << 20
"""Bytes of a weight that stands alone in a program, as a table does. XLA reads a larger one while it multiplies: no
other work is long enough to hide the move to the chip's own memory."""


@dataclasses.dataclass(frozen=True)
class Grouped(Kernel[Product]):
    """A product by one of the two kernels.

    Attributes:
      groups: the weight's static properties.
      dtype: of the activation that the kernel gets.
      cores: the number of cores of the chip.
    """

    platforms = ("tpu",)
    body = Sums
    interpret = False

    groups: Groups
    dtype: DTypeLike
    cores: int = 1

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: where the weight has groups of rows, as `laid_out` stores them."""
        if Decoded.takes(problem) is None or not is_default(problem.precision):
            return None
        w, axes, rows = problem.weight, problem.w_axes, problem.rows
        lead = len(axes.batch)  # experts, each with a weight of its own
        in_order = axes.batch + axes.contract + axes.rows == tuple(range(lead + 2)) and len(axes.contract) == 1
        if lead > 1 or not in_order or w.ndim != lead + 2 or w.scale.shape[:lead] != w.shape[:lead]:
            return None
        if not cls._lies(w):
            return None
        groups, dtype = cls._groups(w, problem.dtype), _dtype_of(problem)
        if groups is None or dtype is None or not isinstance(rows, int) or rows == 0:
            return None
        if not cls._is_for(rows, dtype, groups):
            return None
        if cls.body is not Sums and rows > FEW and _decodes_faster_in_xla(w, groups.decoder):
            return None
        exact = groups.decoder.is_exact and cls.body is Sums
        if not exact and problem.dtype != jnp.bfloat16:
            return None
        k, n = w.shape[-2:]
        fits = cls.body(groups, (jnp.dtype(jnp.bfloat16),), jnp.float32).fits(rows, k, n)
        fits = fits and n >= BLOCK and not (n % BLOCK and _is_fast_by_xla(groups))
        return cls(groups, jnp.dtype(dtype)) if fits else None

    @classmethod
    def _lies(cls, w: QTensor) -> bool:
        """Whether codes lie as the kernel reads them, and XLA takes longer to decode them.

        With one scale per column XLA takes, for 8 rows by [4096, 4096] on a v5e, 76 us of nf4, 27 of fp4, 23 of int4
        with zero points, and 30 of int4 in a stack of layers; the kernel takes 20, 14, 10 and 12. A table of
        [4096, 32000] in int4 takes XLA 190 and the kernel 86. Four layers of [4096, 4096] in fp8, in a stack, take XLA
        171 and the kernel 107.
        """
        return w.split == -2 or (_is_matrix(w) and (_is_large(w) or not _is_converted(w)))

    def on(self, target: Target) -> Grouped:
        """As for `Kernel`."""
        return dataclasses.replace(self, cores=2 if target.chip in TWO_CORES else 1)

    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        """The static properties of a weight in a product of a dtype; None if the kernel does not take it."""
        return weight_groups(w, dtype)

    @classmethod
    def _is_for(cls, rows: int, dtype: DTypeLike, groups: Groups) -> bool:
        """Whether this is the faster of the kernels for so many rows of a dtype."""
        return body_for(rows, dtype, groups) is cls.body

    @property
    def name(self) -> str:
        """The kernel's name in the program."""
        return self.body.name

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`; if XLA partitions the program over several devices, by a product that it partitions."""
        plain = BatchedDecoded.takes(problem) or Decoded.takes(problem)
        assert plain is not None
        return run_undivided(problem, self._undivided, plain.run)

    def _undivided(self, problem: Product) -> jax.Array:
        x, axes, factors = problem.x, problem.x_axes, None
        if isinstance(x, QTensor) and self.dtype == jnp.int8:
            factors, x = scale_values(x.scale), x.logical_codes()
        elif isinstance(x, QTensor):
            x = x.dequantize(self.dtype)
        arrays: dict[str, Any] = weight_arrays(problem.weight) | {"x": axes.flatten(x.astype(self.dtype))}
        if factors is not None:
            own = [factors.shape[i] if i in axes.contract else x.shape[i] for i in range(x.ndim)]
            arrays["rows"] = axes.flatten(jnp.broadcast_to(factors.astype(jnp.float32), own))
        result = jnp.dtype(jnp.float32 if problem.result == jnp.float16 else problem.result)
        how = {"groups": self.groups, "body": self.body, "cores": self.cores, "interpret": self.interpret}
        out = grouped_product(**arrays, **how, result=result)
        return in_tiles(problem.restored(out))


class GroupedSums(Grouped):
    """Few rows: multiplies codes, and scales their sums."""


class GroupedValues(Grouped):
    """Many rows: decodes values once."""

    body = Values


class _Columns(Grouped):
    """4-bit integers of one scale per column, on chips where XLA's product of them takes longer.

    Estimates of libtpu 0.0.42.1 for 8 rows by [4096, 4096], in us: 9.0 by XLA and 6.4 by the kernel on a v6e, 6.0 and
    3.6 on a v5p. On a v5e both take as long as reading the weight, and XLA takes less from 32 rows.
    """

    chips = (V6E, *TWO_CORES)

    @classmethod
    def _lies(cls, w: QTensor) -> bool:
        """As for `Grouped`."""
        return _is_matrix(w) and w.in_int4 and _is_plain(w)


class ColumnSums(_Columns, GroupedSums):
    """As `GroupedSums`."""


class ColumnValues(_Columns, GroupedValues):
    """As `GroupedValues`."""


class GathersBytes:
    """A kernel that reads tables and 4-bit floats by gathers of bytes, and 8-bit floats as bytes, on chips that can."""

    chips = GATHER_BYTES

    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        groups = weight_groups(w, dtype)
        return None if groups is None else groups.in_bytes()


class ManyRows(GathersBytes, GroupedValues):
    """Many rows on chips whose matrix unit sums 256 products: the same chips gather bytes.

    A sum of int8 products over a group of 128 leaves half of the unit idle, and the vector unit scales it: 512 rows of
    int8 by [4096, 4096] in int4 take a v6e 73 thousand cycles so, and 40 in bfloat16, where codes of x are exact.
    """

    body = ValuesInParts

    @classmethod
    def _is_for(cls, rows: int, dtype: DTypeLike, groups: Groups) -> bool:
        """As for `Grouped`; 4-bit floats and tables have kernels of their own there."""
        return rows > FEW and groups.decoder.parts == 1 and dtype != jnp.float32

    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        """As for `Grouped`; integers are decoded as they are."""
        return super()._groups(w, dtype) or weight_groups(w, dtype)


class _Bytewise(GathersBytes, Grouped):
    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        """As for `Grouped`; no entry of a table is rounded both before it is scaled and after."""
        groups = super()._groups(w, dtype)
        if groups is None:
            return None
        once = cls.body is Sums or groups.decoder.is_exact or (groups.scales_tables and w.offset is None)
        return groups if once else None


class ByteSums(_Bytewise, GroupedSums):
    """As `GroupedSums`."""


class ByteValues(_Bytewise, GroupedValues):
    """As `GroupedValues`."""

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`; few rows of 4-bit floats in small groups take less time as `GroupedValues`."""
        kernel = super().takes(problem)
        if isinstance(kernel, Grouped) and problem.rows <= FEW and problem.weight.type.kind == "float":
            groups = kernel.groups
            small = groups.decoder.kind == "table" and not (groups.scales_tables or groups.scales_exactly)
            return None if small else kernel
        return kernel


class _InFloats(Grouped):
    """Multiplies integers as bfloat16, in which they are exact, on chips whose matrix unit has no integers."""

    chips = MULTIPLY_FLOATS_ONLY

    @classmethod
    def _groups(cls, w: QTensor, dtype: DTypeLike) -> Groups | None:
        """As for `Grouped`, of integers."""
        groups = super()._groups(w, dtype)
        whole = groups is not None and groups.decoder.kind == "integers"
        return dataclasses.replace(groups, integers=False) if groups is not None and whole else None


class FloatSums(_InFloats, GroupedSums):
    """As `GroupedSums`."""


class FloatValues(_InFloats, GroupedValues):
    """As `GroupedValues`."""


def weight_groups(w: QTensor, dtype: DTypeLike) -> Groups | None:
    """The static properties of a weight in a product of a dtype; None if the kernels do not take it."""
    k, (count, columns) = w.shape[-2], w.scale.shape[-2:]
    size = k // count
    blocked = w.kept.shape[-2] % BLOCK == 0 and (BLOCK % size == 0 if size < BLOCK else size % BLOCK == 0)
    if size < 8 or not blocked or columns != w.shape[-1] or (w.type.kind == "table" and not w.in_int4):
        return None
    if w.zero_point is not None and not _subtracts(w.zero_point.dtype, dtype):
        return None
    if w.offset is not None and w.offset.dtype != jnp.float32:
        return None
    scale = jax.eval_shape(lambda w: _scale(w)[0], w)
    form = "float8_e4m3fn" if _two_level(w.scale) and w.scale.qtype == "float8_e4m3fn" else scale.dtype.name
    return Groups(size, decoder(w.type), "float32" if form == "float16" else form)


def _is_matrix(w: QTensor) -> bool:
    """Whether codes of 4 bits or fp8, of one scale per column and of known size, lie in the order of rows.

    Every 128 of these are a block.
    """
    lies = w.split is None and not w.minor and (w.in_int4 or w.seal is not None)
    return lies and math.isfinite(number(w.size))


def _decodes_faster_in_xla(w: QTensor, decoder: Decoder) -> bool:
    """Whether XLA's product of many rows, which decodes codes in the order of rows, takes a tenth less time."""
    return (is_fp8_of_columns(w) or decoder.parts > 1) and not decoder.bytewise


def _is_large(w: QTensor) -> bool:
    """Whether XLA's product takes longer than reading codes, though it converts them only: 4-bit integers, and fp8."""
    return is_read_in_product(w) or number(w.nbytes) > _LARGE


def _is_converted(w: QTensor) -> bool:
    """Whether XLA's product makes values of codes by converting their dtype."""
    return w.seal is not None or _is_plain(w)


def _is_plain(w: QTensor) -> bool:
    """Whether values are integers times scales."""
    return w.type.kind == "int" and w.symmetric


def _is_fast_by_xla(groups: Groups) -> bool:
    """Whether XLA's product takes less time than bringing codes to the order of a kernel.

    XLA stores codes of which 128 does not divide the columns with another axis last, and copies them for a kernel in
    every step: 1,028 us for 8 rows of [4096, 32064] in groups of 128 on a v5e, where XLA's product takes 98, and 2,886
    in groups of 32.
    """
    return groups.decoder.kind == "integers" and groups.in_block == 1


def _subtracts(zero: DTypeLike, dtype: DTypeLike) -> bool:
    """Whether zero points may be subtracted in float32: differences are rounded no coarser than values of a product.

    Formats with float zero points round differences to their dtype (`jaxquant.dequantize`).
    """
    return jnp.issubdtype(zero, jnp.integer) or finfo(zero).nmant >= finfo(dtype).nmant


def _two_level(scale: Scale) -> TypeGuard[QTensor]:
    """Whether scales are numbers without zero points, with one factor per column."""
    if not isinstance(scale, QTensor) or not scale.symmetric or scale.permutation is not None or scale.minor:
        return False
    return scale.qtype != FACTOR.name and scale.type.kind != "table" and scale.scale.shape[-2] == 1


def _scale(w: QTensor) -> tuple[jax.Array, jax.Array | None]:
    """Scales by group, 8-bit floats as their patterns, and the factor of all of them, or of those of a column."""
    scale = w.scale
    if _two_level(scale):
        unit = scale_values(scale.scale).astype(jnp.float32)
        codes = scale.stored if scale.qtype == "float8_e4m3fn" else _numbers(scale)
        return codes, unit
    if isinstance(scale, QTensor):
        return scale_values(scale).astype(jnp.float32), None
    return scale, None


def _numbers(scale: QTensor) -> jax.Array:
    """Grid values of integers, and of other types in float32."""
    codes = scale.logical_codes()
    return codes if scale.type.kind == "int" else values_of(codes, scale.type)


def weight_arrays(w: QTensor) -> dict[str, jax.Array | None]:
    """The arrays of a weight, as `grouped_product` takes them."""
    scale, columns = _scale(w)
    offset = None if w.offset is None else flat(w.offset)

    def stacked(value: jax.Array | None) -> jax.Array | None:
        if value is None:
            return None
        whole = w.in_stack(value).reshape(-1, *value.shape[-2:])
        return whole.astype(jnp.float32) if whole.dtype == jnp.float16 else whole  # a TPU has no registers of float16

    beside = {"scale": scale, "zero": w.zero_point, "offset": offset, "columns": columns}
    arrays = {name: stacked(value) for name, value in beside.items()}
    k, n = w.shape[-2:]
    return arrays | {"codes": w.in_stack(w.kept).reshape(-1, k // BLOCK, BLOCK, n), "layer": w.layer}


def _dtype_of(problem: Product) -> DTypeLike | None:
    """The dtype of the activation that the kernels get; None if they do not take it."""
    x, contract = problem.x, problem.x_axes.contract
    if problem.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return None
    dtype = jnp.float32 if problem.dtype == jnp.float16 else problem.dtype  # a TPU has no registers of float16
    if not isinstance(x, QTensor) or x.type.kind != "int":
        return dtype
    alone = x.symmetric and all(x.scale.shape[i] == 1 for i in contract)
    return jnp.int8 if alone and x.type.signed else dtype
