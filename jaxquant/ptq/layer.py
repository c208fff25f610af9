"""The form of a weight for quantizers that use data: a matrix [contracted, rows], in groups, on a grid.

A weight of any rank and axes becomes ``[batch, contracted, rows]``; a column of a matrix is one output. The scales
become ``[batch, groups, rows]``. Batch axes are the axes that the weight shares with its input, such as experts, each
with its own statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.affine import minor_axes, nearest, prepare, quantize
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.codec import codes_of, values_of
from jaxquant.core.errors import quant_error
from jaxquant.core.finite import has_nan
from jaxquant.core.granularity import PerTensor
from jaxquant.core.qtensor import QTensor, Scale, from_codes, scale_values
from jaxquant.core.scale_zero_point import affine
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree

__all__ = ["Layer", "Steps", "stored_scale"]


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(order))


@dataclasses.dataclass(frozen=True)
class Layer:
    """The place of a weight's axes in ``[batch, contracted, rows]``.

    Attributes:
      shape: the weight's shape.
      axes: its reduced axes, sorted, counted from the end.
      spec: how it is quantized.
      batch: the number of independent matrices, each with its own statistics.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    spec: QuantSpec
    batch: int = 1

    @classmethod
    def of(
        cls, function: str, w: ArrayLike, spec: QuantSpec, reduce_axes: Sequence[int] | int
    ) -> tuple[Layer, jax.Array]:
        """The layer of a weight, and the weight as an array; raises what `quantize` raises."""
        w, axes, _, _ = prepare(function, w, spec, reduce_axes, None, None, None)
        if has_nan(w):
            todo = "Find where it comes from; NaN has no code"
            raise quant_error(function, "NaN cannot be quantized", todo=todo, w=w)
        if not axes:
            todo = "Use rtn, or name the contracted axes"
            raise quant_error(function, "needs at least one reduced axis", todo=todo, reduce_axes=axes, shape=w.shape)
        return cls(tuple(w.shape), axes, spec), w

    def batched(self, function: str, batch: int) -> Layer:
        """This layer, with statistics for each of ``batch`` matrices."""
        layer = dataclasses.replace(self, batch=batch)
        if not layer.is_leading() and (layer._rows() % batch or isinstance(self.spec.granularity, PerTensor)):
            raise quant_error(
                function,
                "the batch of the statistics must be the leading axes of the weight, or divide its outputs",
                todo="Take the statistics of this very weight",
                batch=batch,
                shape=self.shape,
            )
        return layer

    def is_leading(self) -> bool:
        """Whether the batch consists of leading axes of the weight, rather than groups of outputs (convolutions)."""
        return math.prod(self.shape[i] for i in self._batch_axes()) == self.batch

    def _rows(self) -> int:
        return math.prod(self.shape) // self.length

    def _batch_axes(self) -> tuple[int, ...]:
        ndim, found, size = len(self.shape), [], 1
        for i in range(ndim):
            if size == self.batch or i - ndim in self.axes:
                break
            found.append(i)
            size *= self.shape[i]
        return tuple(found)

    def _order(self) -> tuple[int, ...]:
        ndim, batch = len(self.shape), self._batch_axes() if self.is_leading() else ()
        reduced = tuple(a + ndim for a in self.axes)
        return batch + reduced + tuple(i for i in range(ndim) if i not in batch + reduced)

    @property
    def length(self) -> int:
        """Contracted elements of each output."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def group(self) -> int:
        """Consecutive contracted elements that share a scale."""
        return self.spec.group_size or self.length

    @property
    def shared(self) -> bool:
        """Whether scales depend on each other: one scale for the whole array, or a factor common to all scales."""
        return isinstance(self.spec.granularity, PerTensor) or self.spec.type.scale_format == "e4m3"

    def _apart(self, x: jax.Array, shape: tuple[int, ...], length: int) -> jax.Array:
        """An array of ``shape``, with ``length`` entries along the reduced axes, as [batch, length, rows]."""
        x = jnp.transpose(x.reshape(shape), self._order())
        if self.is_leading():
            return x.reshape(self.batch, length, -1)
        return jnp.moveaxis(x.reshape(length, self.batch, -1), 0, 1)

    def _together(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        order = self._order()
        if not self.is_leading():
            x = jnp.moveaxis(x, 0, 1)
        return jnp.transpose(x.reshape([shape[i] for i in order]), _inverse(order))

    def split(self, x: jax.Array) -> jax.Array:
        """The weight, or codes of its shape, as ``[batch, contracted, rows]``."""
        return self._apart(x, self.shape, self.length)

    def join(self, x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        return self._together(x, self.shape)

    def _scale_shape(self) -> tuple[int, ...]:
        return scale_shape(self.shape, block_shape(self.shape, self.spec.granularity, self.axes))

    def split_scale(self, scale: Scale) -> jax.Array:
        """Scales or zero points of a `QTensor` as ``[batch, groups, rows]``, in float32."""
        scale = scale_values(scale) if isinstance(scale, QTensor) else scale.astype(jnp.float32)
        if isinstance(self.spec.granularity, PerTensor):
            return jnp.broadcast_to(scale.reshape(1, 1, 1), (self.batch, 1, self._rows() // self.batch))
        return self._apart(scale, self._scale_shape(), self.length // self.group)

    def join_scale(self, scale: jax.Array) -> jax.Array:
        """Inverse of `split_scale`."""
        if isinstance(self.spec.granularity, PerTensor):
            return scale.reshape(-1)[0].reshape(self._scale_shape())
        return self._together(scale, self._scale_shape())

    def values(self, q: QTensor) -> tuple[jax.Array, Steps]:
        """Grid values and steps of a quantized weight."""
        scale = self.split_scale(q.scale)
        zero = jnp.zeros_like(scale) if q.zero_point is None else self.split_scale(q.zero_point)
        return self.split(values_of(q.logical_codes(), q.type, jnp.float32)), Steps(scale, zero)

    def nearest(self, w: jax.Array) -> QTensor:
        """The weight rounded to nearest, with the range of its spec."""
        return quantize(w, self.spec, reduce_axes=self.axes)

    def qtensor(
        self,
        values: jax.Array,
        steps: Steps,
        dtype: DTypeLike,
        scale: Scale | None = None,
        permutation: jax.Array | None = None,
    ) -> QTensor:
        """The `QTensor` of grid values and their steps.

        Args:
          values: [batch, contracted, rows], in the order of the permutation if there is one.
          steps: [batch, groups, rows].
          dtype: the weight's.
          scale: the quantized form of the scales, if they are quantized themselves.
          permutation: [batch, contracted], of a weight with a single reduced axis, or None.
        """
        spec, ndim = self.spec, len(self.shape)
        own = scale if isinstance(scale, QTensor) else self.join_scale(steps.scale).astype(stored_scale(spec))
        zero_point = None if spec.symmetric else self.join_scale(steps.zero).astype(spec.type.code_dtype)
        codes = codes_of(self.join(values), spec.type)
        if permutation is not None:
            (axis,) = self.axes
            batch = self._batch_axes() if self.is_leading() else ()
            shape = [n if i in batch or i == axis + ndim else 1 for i, n in enumerate(self.shape)]
            permutation = permutation.reshape(shape).astype(jnp.int32)
        minor = minor_axes(self.axes, ndim)
        return from_codes(codes, own, zero_point, qtype=spec.qtype, dtype=dtype, minor=minor, permutation=permutation)

    def map(self, fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """Applies ``fn`` to one matrix after the other, so that working memory holds one matrix."""
        if self.batch == 1:
            return jax.tree.map(lambda x: x[None], fn(*(jax.tree.map(lambda x: x[0], a) for a in args)))
        return jax.lax.map(lambda a: fn(*a), args)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Scales, and zero points in units of the scales (0 if symmetric), float32 arrays of one shape."""

    scale: jax.Array
    zero: jax.Array

    @classmethod
    def of_range(cls, lo: jax.Array, hi: jax.Array, spec: QuantSpec) -> Steps:
        """The steps that cover ranges, rounded to the spec's storage types."""
        scale, zero_point = affine(lo, hi, spec)
        scale = scale_values(scale)
        return cls(scale, jnp.zeros_like(scale) if zero_point is None else zero_point.astype(scale.dtype))

    def round(self, x: jax.Array, spec: QuantSpec) -> jax.Array:
        """The nearest grid value of each element."""
        return nearest(x, self.scale, None if spec.symmetric else self.zero, spec)

    def real(self, values: jax.Array) -> jax.Array:
        """The real values of grid values."""
        return (values - self.zero) * self.scale

    def __getitem__(self, index: jax.Array | tuple[slice | int | None, ...] | None) -> Steps:
        return Steps(self.scale[index], self.zero[index])


def stored_scale(spec: QuantSpec) -> DTypeLike:
    """The dtype in which the scales of a spec are stored, unless they are quantized themselves."""
    return jnp.float8_e8m0fnu if spec.type.scale_format == "e8m0" else jnp.dtype(spec.scale_dtype or jnp.float32)
