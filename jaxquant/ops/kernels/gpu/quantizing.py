"""Activations quantized in one pass: a GPU finds the range of a row and writes its codes while it holds the row.

XLA reads the activation twice, and applies scales that the same program computes in a separate pass over the product.
It treats the results of a kernel as arguments, so it fuses these scales into the product that follows.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes

from jaxquant.core.affine import quantized_by_itself
from jaxquant.core.granularity import PerChannel
from jaxquant.core.observers import AbsMax
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree

__all__ = ["rows_at_once", "rows_quantized"]

_LONGEST = 1 << 14  # elements of a row that the registers of a program hold
_SHORTEST = 16
_AT_ONCE = 1 << 12  # elements of a program, where rows are shorter


def _fits(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> bool:
    """Whether an array has rows, each with a scale for int8 by its largest magnitude, that a program can hold."""
    del apart
    per_row = spec.qtype == "int8" and spec.symmetric and isinstance(spec.granularity, PerChannel)
    plain = per_row and spec.scale_dtype is None and spec.rounding == "nearest" and not spec.whole_range
    if not plain or type(spec.observer) is not AbsMax or x.dtype == jnp.float64:
        return False
    if not all(isinstance(n, int) for n in x.shape) or axes != tuple(range(-len(axes), 0)) or len(axes) >= x.ndim:
        return False
    sharded = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    length = math.prod(x.shape[x.ndim - len(axes) :])
    return x.size > 0 and _SHORTEST <= length <= _LONGEST and all(axis is None for axis in sharded)


@quantized_by_itself.on("cuda", when=_fits)
def rows_quantized(x: jax.Array, *, spec: QuantSpec, axes: tuple[int, ...], apart: bool) -> QTensor:
    """`jaxquant.core.affine.as_codes` of an array by its own range."""
    del apart
    return rows_at_once(x, spec, axes)


def rows_at_once(x: jax.Array, spec: QuantSpec, axes: tuple[int, ...], *, interpret: bool = False) -> QTensor:
    """int8 codes of an array, one scale for each row, in one kernel.

    Args:
      x: the array.
      spec: symmetric int8.
      axes: the last axes, which share a scale.
      interpret: run in Pallas' interpreter, on any device.
    """
    from jaxquant.ops.kernels.gpu.partition import partitioned  # Pallas takes long to load

    lead = x.shape[: x.ndim - len(axes)]

    def mapped(size: int, is_mapped: list[bool], x: jax.Array) -> tuple[PyTree, PyTree]:
        del is_mapped
        codes, scale = call(x.reshape(-1, x.shape[-1]))
        return (codes.reshape(x.shape), scale.reshape(size, -1)), (True, True)

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array) -> PyTree:
        one = functools.partial(_on_one_device, spec=spec, interpret=interpret)
        return partitioned(lambda *_: one, (x,), (["mk"], ["mk", "m"]), {"m": x.shape[0]})

    call.def_vmap(mapped)
    codes, scale = call(x.reshape(math.prod(lead), -1))
    return QTensor(
        codes.reshape(x.shape), scale.reshape(*lead, *(1,) * len(axes)), None, qtype=spec.qtype, dtype=x.dtype
    )


def _on_one_device(x: jax.Array, *, spec: QuantSpec, interpret: bool) -> PyTree:
    """Codes and scales of [M, K]."""
    from jax.experimental import pallas as pl

    from jaxquant.ops.kernels.gpu.triton import params, shaped

    rows, length = x.shape
    held = 1 << (length - 1).bit_length()
    at_once = max(1, min(_AT_ONCE // held, 1 << (rows - 1).bit_length()))
    return pl.pallas_call(
        _Kernel(rows, length, at_once, held, spec.type.qmin, spec.type.qmax, interpret),
        out_shape=(shaped((rows, length), jnp.int8, x), shaped((rows,), jnp.float32, x)),
        grid=(-(-rows // at_once),),
        interpret=interpret,
        compiler_params=params(8 if held >= 2 * _AT_ONCE else 4, 1),
        name="quantized_rows",
    )(x)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The body: some rows, each whole.

    Attributes:
      rows, length: of the array.
      at_once, held: rows and elements of a program.
      qmin, qmax: of the codes.
      interpret: whether it runs in the interpreter.
    """

    rows: int
    length: int
    at_once: int
    held: int
    qmin: float
    qmax: float
    interpret: bool

    def __call__(self, x: jax.Ref, codes: jax.Ref, scales: jax.Ref) -> None:
        from jax.experimental import pallas as pl

        from jaxquant.ops.kernels.gpu.triton import divide, load, nearest, store

        row = pl.program_id(0) * self.at_once + jax.lax.iota(jnp.int32, self.at_once)
        at = row[:, None], jax.lax.iota(jnp.int32, self.held)[None, :]
        of_row = None if self.rows % self.at_once == 0 else row < self.rows
        inside = None if self.length == self.held else at[1] < self.length
        if of_row is not None:
            inside = of_row[:, None] if inside is None else inside & of_row[:, None]
        values = load(x, at, inside).astype(jnp.float32)
        magnitude = jnp.abs(values)
        absmax = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0.0), axis=1)
        nan = jnp.max(jnp.where(values != values, 1.0, 0.0), axis=1) > 0
        info = ml_dtypes.finfo(jnp.float32)
        scale = divide(absmax, jnp.full(absmax.shape, self.qmax, jnp.float32), interpret=self.interpret)
        scale = jnp.minimum(jnp.maximum(scale, float(info.tiny)), float(info.max))
        scale = jnp.where(nan, jnp.nan, jnp.where(absmax == 0, 1.0, scale))
        steps = jnp.broadcast_to(scale[:, None], values.shape)
        found = divide(values, steps, interpret=self.interpret)
        found = nearest(jnp.minimum(jnp.maximum(found, self.qmin), self.qmax), interpret=self.interpret)
        store(codes, at, found.astype(jnp.int8), inside)
        store(scales, (row,), scale, of_row)
